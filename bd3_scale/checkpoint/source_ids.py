"""Keep the special token ids of an imported model's configuration; they are copied into every training from it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bd3_scale.checkpoint.manifest import IMPORTED, TOKENIZER
from bd3_scale.resilience.foreign import CONFIG, object_in, safe_settings
from bd3_scale.resilience.readers import reader

# Stored in the tokeniser's folder, which is copied from an import to a run, its checkpoints and their exports.
SOURCE_IDS = "source_ids.json"
GENERATION_CONFIG = "generation_config.json"
KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class SourceIds:
    """The special ids of a model. config: those of `KEYS` that its config.json has; generation_config: the content of
    generation_config.json without entries that name code.
    """

    config: dict[str, Any]
    generation_config: dict[str, Any]


@reader("a model's ids", path="checkpoint")
def source_ids(checkpoint: Path) -> SourceIds:
    """Return the special ids of the model that a checkpoint was imported from; empty if it was not imported.

    ValueError: a file is not a JSON object.
    """
    kept = object_in(checkpoint / TOKENIZER, SOURCE_IDS)
    if not kept:
        # Older imports keep copies of the source's files instead.
        return ids_of_model(checkpoint / IMPORTED)
    return _source_ids(*(kept.get(name, {}) for name in ("config", "generation_config")))


@reader("a model's ids", path="folder")
def ids_of_model(folder: Path) -> SourceIds:
    """Return the special ids of a Hugging Face model folder. ValueError: a file is not a JSON object, or is a link."""
    return _source_ids(*(object_in(folder, name) for name in (CONFIG, GENERATION_CONFIG)))


def keep_source_ids(ids: SourceIds, tokenizer: Path) -> None:
    """Write the special ids into the folder `tokenizer`."""
    (tokenizer / SOURCE_IDS).write_text(json.dumps(asdict(ids), indent=2) + "\n", encoding="utf-8")


def _source_ids(config: Any, generation_config: Any) -> SourceIds:
    for content in (config, generation_config):
        if not isinstance(content, dict):
            raise ValueError("config and generation_config must be JSON objects")
    return SourceIds(
        safe_settings({key: config[key] for key in KEYS if key in config}), safe_settings(generation_config)
    )
