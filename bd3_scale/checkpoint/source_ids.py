"""What the configuration of an imported model says of its special ids; it goes on with every training from it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bd3_scale.checkpoint.manifest import IMPORTED, TOKENIZER
from bd3_scale.resilience.files import read_object

# Lies beside the tokeniser, which goes from an import to a run, its checkpoints and their exports.
SOURCE_IDS = "source_ids.json"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class SourceIds:
    """Holds what two files of a model say. config: its ids by the names of `KEYS`, as far as it has them;
    generation_config: all of it.
    """

    config: dict[str, Any]
    generation_config: dict[str, Any]


def source_ids(checkpoint: Path) -> SourceIds:
    """Return the ids of the model that a checkpoint came from; nothing where it came from none.

    ValueError: a file is no JSON object.
    """
    kept = _read(checkpoint / TOKENIZER / SOURCE_IDS)
    if kept:
        return SourceIds(kept.get("config", {}), kept.get("generation_config", {}))
    # An import of before has its source's files alone.
    return _from_files(checkpoint / IMPORTED)


def keep_source_ids(source: Path, tokenizer: Path) -> None:
    """Write what the model folder `source` says into the folder `tokenizer`."""
    found = _from_files(source)
    content = {"config": found.config, "generation_config": found.generation_config}
    (tokenizer / SOURCE_IDS).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _from_files(folder: Path) -> SourceIds:
    config = _read(folder / CONFIG)
    return SourceIds({key: config[key] for key in KEYS if key in config}, _read(folder / GENERATION_CONFIG))


def _read(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}
