"""The newest sound checkpoint of a run, agreed by all ranks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch.distributed as dist

from bd3_scale.checkpoint.folder import list_checkpoints, name_latest
from bd3_scale.checkpoint.manifest import CheckpointDamagedError, CheckpointManifest, read_manifest
from bd3_scale.checkpoint.verify import Mode, check_checkpoint
from bd3_scale.parallel.collective import gather_values, on_rank_zero
from bd3_scale.resilience.files import unused_path

_LOG = logging.getLogger(__name__)
DAMAGED = "damaged-"


def check_together(folder: Path, mode: Mode) -> str | None:
    """Return what is damaged of a checkpoint, of which each rank reads a share, or None (collective).

    ValueError, OSError, on all ranks: a rank cannot read it, or sees another state of it than rank 0.
    """
    world = dist.get_world_size()
    found = gather_values(_problem(folder, mode, dist.get_rank(), world))
    for rank, (kind, text) in enumerate(found):
        if kind == "unreadable":
            raise ValueError(f"rank {rank} cannot read a checkpoint: {text}")
    bad = [rank for rank, (kind, _) in enumerate(found) if kind == "damaged"]
    if not bad:
        return None
    seen = on_rank_zero(lambda: [_problem(folder, mode, rank, world) for rank in bad])
    for rank, (kind, text) in zip(bad, seen, strict=True):
        if kind == "damaged":
            return text
        raise ValueError(
            f"rank {rank} finds what rank 0 does not: {found[rank][1]}; does its node see the run directory as it is?"
        )
    return None


def newest_sound(checkpoints: Path, mode: Mode) -> tuple[Path, CheckpointManifest] | None:
    """The newest checkpoint of a run's folder that is sound, or None where there is none at all (collective).

    Damaged ones that are newer are moved aside, under a name that begins with `damaged-`, with a warning.

    ValueError, with nothing moved: there are checkpoints, and none is sound, or as `check_together`.
    """
    problems: list[tuple[Path, str]] = []
    for name in reversed(on_rank_zero(lambda: [str(path) for path in list_checkpoints(checkpoints)])):
        folder = Path(name)
        problem = check_together(folder, mode)
        if problem is None:
            on_rank_zero(partial(_take, folder, problems))
            return folder, read_manifest(folder)
        problems.append((folder, problem))
    if problems:
        raise ValueError(
            f"none of the checkpoints in {checkpoints} is sound: {'; '.join(problem for _, problem in problems)}; mend "
            "one, or begin anew with run_dir=FOLDER"
        )
    return None


def _problem(folder: Path, mode: Mode, rank: int, world: int) -> list[str]:
    """Return the kind of problem (damaged or unreadable) and its text; both are empty where there is none."""
    try:
        check_checkpoint(folder, mode, slice(rank, None, world))
    except CheckpointDamagedError as error:
        return ["damaged", str(error)]
    except (ValueError, OSError) as error:
        return ["unreadable", str(error)]
    return ["", ""]


def _take(sound: Path, problems: Sequence[tuple[Path, str]]) -> None:
    for folder, problem in problems:
        aside = unused_path(folder.with_name(DAMAGED + folder.name))
        folder.rename(aside)
        _LOG.warning("%s; it is moved to %s, and an older one is taken", problem, aside.name)
    # Whatever was killed since its name was due.
    name_latest(sound.parent)
