"""Check checkpoints against their manifests, and choose those that a run deletes."""

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
    """Return the manifest of a sound checkpoint: `fast` compares sizes, `full` also the hash of each file of `share`.

    Raises:
        CheckpointDamagedError: files differ from what was written; the message names them.
        ValueError: it was written by another version.
    """
    manifest = read_manifest(folder)
    step = step_of(folder)
    if step is not None and manifest.step != step:
        raise CheckpointDamagedError(f"checkpoint {folder} is damaged: its manifest says step {manifest.step}")
    if mode == "full" and (damaged := damaged_files(folder, manifest, share)):
        raise CheckpointDamagedError(
            f"checkpoint {folder} is damaged: {', '.join(damaged)} differs from what was written; use an earlier "
            "checkpoint"
        )
    return manifest


def describe(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's step, size and states, and the NELBO that its run measured. ValueError: it is damaged."""
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
    """Return the `checkpoints` (by step) of the folder `run` that may be deleted, never the newest complete one."""
    steps = sorted(checkpoints)
    kept = set(steps[-recipe.keep_last :])
    if recipe.keep_every_steps:
        kept |= {step for step in steps if step % recipe.keep_every_steps == 0}
    if recipe.keep_best:
        nelbos = read_nelbos(run / METRICS_FILE)
        measured = nelbos.keys() & checkpoints.keys()
        kept |= set(sorted(measured, key=lambda step: (nelbos[step], step))[: recipe.keep_best])
    # A replay of the last anomalous step starts from the checkpoint before it.
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
