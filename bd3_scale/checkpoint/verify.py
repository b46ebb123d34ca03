"""Whether checkpoints are what was written, and which of them a run keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from bd3_scale.checkpoint.folder import step_of
from bd3_scale.checkpoint.manifest import CheckpointDamagedError, CheckpointManifest, damaged_files, read_manifest
from bd3_scale.observe.metrics import METRICS_FILE, last_event, read_nelbos
from bd3_scale.recipe.schema import CheckpointRecipe

Mode = Literal["full", "fast"]


def check_checkpoint(folder: Path, mode: Mode, share: slice = slice(None)) -> CheckpointManifest:
    """The manifest of a sound checkpoint: `fast` compares sizes, `full` also the hash of each file of `share`.

    Raises:
        CheckpointDamagedError: it is not what was written; what is damaged is named.
        ValueError: it was written by another version.
    """
    manifest = read_manifest(folder)
    step = step_of(folder)
    if step is not None and manifest.step != step:
        raise CheckpointDamagedError(f"checkpoint {folder} is damaged: its manifest is of step {manifest.step}")
    if mode == "full" and (damaged := damaged_files(folder, manifest, share)):
        raise CheckpointDamagedError(
            f"checkpoint {folder} is damaged: {', '.join(damaged)} is not what was written; use an earlier checkpoint"
        )
    return manifest


def describe(folder: Path) -> dict[str, Any]:
    """Return what a checkpoint says of itself, and the NELBO of its step in its run. ValueError: it is damaged."""
    manifest = read_manifest(folder)
    return {
        "name": folder.name,
        "step": manifest.step,
        "bytes": sum(record.bytes for record in manifest.files.values()),
        "ranks": manifest.world_size,
        "states": manifest.states,
        "skipped": manifest.skipped,
        "nelbo": read_nelbos(folder.absolute().parents[1] / METRICS_FILE).get(manifest.step),
    }


def surplus(checkpoints: Mapping[int, Path], recipe: CheckpointRecipe, run: Path) -> Sequence[Path]:
    """Those that may go, of the `checkpoints` of the folder `run` by step; never the newest that is complete."""
    steps = sorted(checkpoints)
    kept = set(steps[-recipe.keep_last :])
    if recipe.keep_every_steps:
        kept |= {step for step in steps if step % recipe.keep_every_steps == 0}
    if recipe.keep_best:
        found = read_nelbos(run / METRICS_FILE)
        kept |= set(sorted(found.keys() & checkpoints.keys(), key=lambda step: (found[step], step))[: recipe.keep_best])
    # What a replay of the last step that stood out begins with.
    if (event := last_event(run)) is not None:
        kept |= set([step for step in steps if step < event][-1:])
    newest = next((step for step in reversed(steps) if _is_complete(checkpoints[step])), None)
    return [checkpoints[step] for step in steps if step not in kept and step != newest]


def _is_complete(checkpoint: Path) -> bool:
    try:
        read_manifest(checkpoint)
    except (ValueError, OSError):
        return False
    return True
