"""Where a run goes on from, and whether it may."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bd3_scale.checkpoint.manifest import CheckpointManifest
from bd3_scale.recipe.schema import Recipe

# What may not change within a run: weights, noise and data position would mean something else.
_FIXED = (
    "seed",
    "model",
    "diffusion",
    "data.seq_len",
    "data.isolate_documents",
    "data.shuffle",
    "train.global_batch_size",
    "train.precision",
)


def check_resumable(checkpoint: Path, manifest: CheckpointManifest, recipe: Recipe, data_hash: str) -> None:
    """Whether a run of `recipe` can continue from a checkpoint.

    Raises:
        ValueError: the recipe or the data differ in what a run may not change; every difference is named.
    """
    differences = [
        f"{key} is {_show(new)}, the checkpoint has {_show(old)}"
        for path in _FIXED
        for key, old, new in _differences(path, _at(manifest.recipe, path), _at(recipe, path))
    ]
    if bool(manifest.recipe.optimizer.ema_decay) != bool(recipe.optimizer.ema_decay):
        old, new = manifest.recipe.optimizer.ema_decay, recipe.optimizer.ema_decay
        differences.append(
            f"optimizer.ema_decay is {new}, the checkpoint has {old}: a moving average is kept from the start"
        )
    if manifest.data_hash != data_hash:
        differences.append(
            f"the prepared data (hash {data_hash}) are not those of the checkpoint ({manifest.data_hash})"
        )
    if manifest.step > recipe.train.steps:
        differences.append(f"train.steps is {recipe.train.steps}, the checkpoint has done {manifest.step}")
    if differences:
        raise ValueError(
            f"{checkpoint} cannot be resumed:\n  - "
            + "\n  - ".join(differences)
            + "\nput these values back, or start another run with run_dir=FOLDER"
        )


def _at(recipe: Recipe, path: str) -> Any:
    value: Any = recipe.model_dump(mode="json")
    for key in path.split("."):
        value = value[key]
    return value


def _differences(path: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict):
        for key in old:
            yield from _differences(f"{path}.{key}", old[key], new[key])
    elif old != new:
        yield path, old, new


def _show(value: Any) -> str:
    return "unset" if value is None else str(value)
