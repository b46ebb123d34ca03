"""What the configuration of an imported model says of its special ids; it goes on with every training from it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bd3_scale.checkpoint.manifest import IMPORTED, TOKENIZER
from bd3_scale.resilience.foreign import CONFIG, object_in, safe_settings
from bd3_scale.resilience.readers import reader

# Lies beside the tokeniser, which goes from an import to a run, its checkpoints and their exports.
SOURCE_IDS = "source_ids.json"
GENERATION_CONFIG = "generation_config.json"
KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class SourceIds:
    """Holds what two files of a model say. config: its ids by the names of `KEYS`, as far as it has them;
    generation_config: all of it that names no code.
    """

    config: dict[str, Any]
    generation_config: dict[str, Any]


@reader("a model's ids", path="checkpoint")
def source_ids(checkpoint: Path) -> SourceIds:
    """Return the ids of the model that a checkpoint came from; nothing where it came from none.

    ValueError: a file is no JSON object.
    """
    kept = object_in(checkpoint / TOKENIZER, SOURCE_IDS)
    if not kept:
        # An import of before has its source's files alone.
        return ids_of_model(checkpoint / IMPORTED)
    return _source_ids(*(kept.get(name, {}) for name in ("config", "generation_config")))


@reader("a model's ids", path="folder")
def ids_of_model(folder: Path) -> SourceIds:
    """Return what the model folder of other software says. ValueError: a file is no JSON object, or leads elsewhere."""
    return _source_ids(*(object_in(folder, name) for name in (CONFIG, GENERATION_CONFIG)))


def keep_source_ids(found: SourceIds, tokenizer: Path) -> None:
    """Write what is known into the folder `tokenizer`."""
    (tokenizer / SOURCE_IDS).write_text(json.dumps(asdict(found), indent=2) + "\n", encoding="utf-8")


def _source_ids(config: Any, generation_config: Any) -> SourceIds:
    for content in (config, generation_config):
        if not isinstance(content, dict):
            raise ValueError("config and generation_config must be JSON objects")
    return SourceIds(
        safe_settings({key: config[key] for key in KEYS if key in config}), safe_settings(generation_config)
    )
