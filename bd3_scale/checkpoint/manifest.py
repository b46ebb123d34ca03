"""What a checkpoint says about itself; written last, so that a folder with a sound manifest is complete."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from bd3_scale.recipe.schema import Recipe
from bd3_scale.recipe.vocabulary import Vocabulary

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"


class CheckpointManifest(BaseModel):
    """Self-description of a checkpoint.

    Attributes:
        step: optimiser steps done, from which schedules, data position and noise follow.
        data_hash: hash of the data manifest (tokeniser, sequences) that the position counts in.
        world_size: ranks that wrote it; any number may read it.
        states: fp32 tensors kept of every parameter.
        attention_tiles: tiles of the attention kernels, which a bitwise resume needs; empty where none are used.
        files: size of every file in bytes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    step: int
    recipe: Recipe
    recipe_hash: str
    vocabulary: Vocabulary
    data_hash: str
    world_size: int
    states: tuple[str, ...]
    attention_tiles: dict[str, list[int]] = {}
    files: dict[str, int] = {}


def read_manifest(folder: Path) -> CheckpointManifest:
    """The manifest of a complete checkpoint.

    Raises:
        ValueError: the folder is no checkpoint, was left half written, or has lost or truncated a file.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{folder} is no complete checkpoint: it has no {MANIFEST}, which is written last; "
            "give a folder like RUN/checkpoints/step-00000100, or remove a half-written one"
        )
    try:
        manifest = CheckpointManifest.model_validate_json(path.read_text())
    except ValidationError as error:
        raise ValueError(f"{path} cannot be read: {error}; use another checkpoint of the run") from error
    for name, size in manifest.files.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise ValueError(
                f"checkpoint {folder} is damaged: {name} {state}, {size} were written; use an earlier checkpoint"
            )
    return manifest
