"""Find the newest sound checkpoint of a run, so that all ranks agree on it."""

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
    """Return what is damaged in a checkpoint, or None (collective). Each rank reads a share of the files.

    ValueError, OSError, on all ranks: a rank cannot read it, or finds damage that rank 0 does not find.
    """
    world = dist.get_world_size()
    problems = gather_values(_problem(folder, mode, dist.get_rank(), world))
    for rank, (kind, text) in enumerate(problems):
        if kind == "unreadable":
            raise ValueError(f"rank {rank} cannot read a checkpoint: {text}")
    bad = [rank for rank, (kind, _) in enumerate(problems) if kind == "damaged"]
    if not bad:
        return None
    # Damage on one node alone is a fault of its view (a stale cache of a shared file system), and no reason to give up
    # a checkpoint: rank 0 reads the same shares again.
    confirmed = on_rank_zero(lambda: [_problem(folder, mode, rank, world) for rank in bad])
    for rank, (kind, text) in zip(bad, confirmed, strict=True):
        if kind == "damaged":
            return text
        raise ValueError(
            f"rank {rank} finds a problem that rank 0 does not find: {problems[rank][1]}; check that its node mounts "
            "the same run directory"
        )
    return None


def newest_sound(checkpoints: Path, mode: Mode) -> tuple[Path, CheckpointManifest] | None:
    """Return the newest sound checkpoint of a run's folder, or None if the folder holds no checkpoint (collective).

    Newer, damaged ones are renamed, to a name that begins with `damaged-`, with a warning.

    ValueError, with nothing renamed: there are checkpoints, but none is sound; or as in `check_together`.
    """
    problems: list[tuple[Path, str]] = []
    for name in reversed(on_rank_zero(lambda: [str(path) for path in list_checkpoints(checkpoints)])):
        folder = Path(name)
        problem = check_together(folder, mode)
        if problem is None:
            on_rank_zero(partial(_rename_damaged, folder, problems))
            return folder, read_manifest(folder)
        problems.append((folder, problem))
    if problems:
        raise ValueError(
            f"none of the checkpoints in {checkpoints} is sound: {'; '.join(problem for _, problem in problems)}; "
            "repair one, or start anew with run_dir=FOLDER"
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


def _rename_damaged(sound: Path, problems: Sequence[tuple[Path, str]]) -> None:
    for folder, problem in problems:
        aside = unused_path(folder.with_name(DAMAGED + folder.name))
        folder.rename(aside)
        _LOG.warning("%s; it is renamed to %s, and an older checkpoint is used", problem, aside.name)
    # A save that was killed between its rename and its end has not updated `latest`.
    name_latest(sound.parent)
