"""Whether checkpoints are what was written, and which one a run can go on from."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from bd3_scale.checkpoint.manifest import CheckpointManifest, damaged_files, read_manifest
from bd3_scale.checkpoint.store import list_checkpoints, name_latest, step_of
from bd3_scale.observe.metrics import METRICS_FILE, read_metrics
from bd3_scale.parallel.collective import gather_objects, on_rank_zero

_LOG = logging.getLogger(__name__)
DAMAGED = "damaged-"
Mode = Literal["full", "fast"]


def check_checkpoint(folder: Path, mode: Mode, share: slice = slice(None)) -> CheckpointManifest:
    """The manifest of a sound checkpoint: `fast` compares sizes, `full` also the hash of each file of `share`.

    ValueError: it is incomplete or damaged; what is damaged is named.
    """
    manifest = read_manifest(folder)
    step = step_of(folder)
    if step is not None and manifest.step != step:
        raise ValueError(f"checkpoint {folder} is damaged: its manifest is of step {manifest.step}")
    if mode == "full" and (damaged := damaged_files(folder, manifest, share)):
        raise ValueError(f"checkpoint {folder} is damaged: {', '.join(damaged)} is not what was written")
    return manifest


def newest_sound(checkpoints: Path, mode: Mode) -> tuple[Path, CheckpointManifest] | None:
    """The newest checkpoint of a run's folder that is sound, or None where there is none at all (collective).

    A damaged one is moved aside, under a name that begins with `damaged-`, with a warning; each rank reads its share.

    ValueError: there are checkpoints, and none is sound.
    """
    moved = []
    while folder := on_rank_zero(lambda: next(iter(reversed(list_checkpoints(checkpoints))), None)):
        problems = [problem for problem in gather_objects(_problem(folder, mode)) if problem]
        if not problems:
            return folder, read_manifest(folder)
        moved.append(on_rank_zero(_moving_aside(folder, problems[0])))
    if moved:
        raise ValueError(
            f"none of the checkpoints in {checkpoints} is sound, and all are moved aside: put back one of "
            f"{', '.join(path.name for path in moved)} that you have mended, or begin anew with run_dir=FOLDER"
        )
    return None


def _problem(folder: Path, mode: Mode) -> str | None:
    try:
        check_checkpoint(folder, mode, slice(dist.get_rank(), None, dist.get_world_size()))
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _moving_aside(folder: Path, problem: str) -> Callable[[], Path]:
    def move() -> Path:
        aside = folder.with_name(DAMAGED + folder.name)
        number = 1
        while aside.exists():
            number += 1
            aside = folder.with_name(f"{DAMAGED}{folder.name}-{number}")
        folder.rename(aside)
        name_latest(folder.parent)
        _LOG.warning("%s; it is moved to %s, and an older one is taken", problem, aside.name)
        return aside

    return move


def describe(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, and the NELBO that its run recorded at its step. ValueError: it is damaged."""
    manifest = read_manifest(folder)
    metrics = folder.parents[1] / METRICS_FILE
    found = {r["step"]: r["nelbo"] for r in read_metrics(metrics) if "nelbo" in r} if metrics.exists() else {}
    return {
        "name": folder.name,
        "step": manifest.step,
        "bytes": sum(record.bytes for record in manifest.files.values()),
        "ranks": manifest.world_size,
        "states": manifest.states,
        "skipped": manifest.skipped,
        "nelbo": found.get(manifest.step),
    }
