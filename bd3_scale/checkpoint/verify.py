"""Whether checkpoints are what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from bd3_scale.checkpoint.folder import step_of
from bd3_scale.checkpoint.manifest import CheckpointDamagedError, CheckpointManifest, damaged_files, read_manifest
from bd3_scale.observe.metrics import METRICS_FILE, read_nelbos

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
    """What a checkpoint says of itself, and the NELBO that its run recorded at its step. ValueError: it is damaged."""
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
