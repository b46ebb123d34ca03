"""Saving, finding and loading the checkpoints of a run.

A checkpoint is a folder `step-<n>`: safetensors files, an index, the tokeniser and a manifest. It is written aside
under a name that starts with a dot, synced and renamed, so that a folder without the dot is complete.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from bd3_scale.checkpoint.boxes import Box, boxes_of
from bd3_scale.checkpoint.manifest import MANIFEST, TOKENIZER, CheckpointManifest, write_manifest
from bd3_scale.checkpoint.planner import BoxLoadPlanner, BoxSavePlanner
from bd3_scale.checkpoint.storage import SafetensorsReader, SafetensorsWriter
from bd3_scale.model.layout import ParameterLayout
from bd3_scale.parallel.collective import gather_objects, on_rank_zero
from bd3_scale.parallel.zero import ZeroState
from bd3_scale.resilience.files import sync

_STEP = re.compile(r"step-(\d{8,})")
_PARTIAL = ".partial-"


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run's checkpoint folder, oldest first."""
    found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def resolve_checkpoint(path: Path) -> Path:
    """`path` itself if it is a checkpoint, or the newest one of a run directory.

    Raises:
        ValueError: there is none.
    """
    if (path / MANIFEST).is_file():
        return path
    checkpoints = list_checkpoints(path / "checkpoints")
    if not checkpoints:
        raise ValueError(f"{path} is neither a checkpoint nor a run directory with one in {path / 'checkpoints'}")
    return checkpoints[-1]


def remove_partial(folder: Path) -> list[Path]:
    """Remove what a killed save left behind; returns what it removed."""
    left = sorted(folder.glob(f"{_PARTIAL}*")) if folder.is_dir() else []
    for path in left:
        shutil.rmtree(path)
    return left


def save_checkpoint(
    folder: Path,
    manifest: CheckpointManifest,
    zero: ZeroState,
    layouts: Sequence[ParameterLayout],
    *,
    tokenizer: Path,
    keep_last: int,
) -> Path:
    """Save the optimiser's state on all ranks (collective), then drop all but the newest `keep_last` checkpoints.

    Raises:
        OSError: it could not be written; older checkpoints are untouched.
    """
    target = folder / f"step-{manifest.step:08d}"
    partial = folder / f"{_PARTIAL}{target.name}"
    try:
        on_rank_zero(lambda: _prepare(partial, tokenizer))
        writer = SafetensorsWriter(partial, dist.get_rank())
        save({}, storage_writer=writer, planner=BoxSavePlanner(_state_boxes(zero, layouts, writers_only=True)))
        hashes = {name: value for rank in gather_objects(writer.hashes) for name, value in rank.items()}
        on_rank_zero(lambda: _commit(partial, target, manifest, hashes))
    except (CheckpointException, OSError) as error:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"the checkpoint of step {manifest.step} could not be written to {folder}: {_reasons(error)}; "
            "older ones are whole"
        ) from error
    on_rank_zero(lambda: _remove(list_checkpoints(folder)[:-keep_last]))
    return target


def load_training_state(
    checkpoint: Path, manifest: CheckpointManifest, zero: ZeroState, layouts: Sequence[ParameterLayout]
) -> None:
    """Load masters, moments and moving average in place, on whatever layout this run has (collective).

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    missing = set(zero.names) - set(manifest.states)
    if missing:
        raise ValueError(
            f"{checkpoint} holds no {', '.join(sorted(missing))}: set optimizer.ema_decay as the run that wrote it"
        )
    _load(checkpoint, _state_boxes(zero, layouts, writers_only=False))
    zero.loaded(manifest.step)


def load_weights(checkpoint: Path, manifest: CheckpointManifest, layouts: Sequence[ParameterLayout]) -> None:
    """Load a model without its optimiser (collective): the moving average where kept, else the masters, in the
    model's dtype.
    """
    state = manifest.weights_state
    boxes = [b for layout in layouts for b in boxes_of(layout.pieces, 0, {state: layout.parameter.data.view(-1)})]
    _load(checkpoint, boxes)


def load_initial_weights(
    checkpoint: Path, manifest: CheckpointManifest, zero: ZeroState, layouts: Sequence[ParameterLayout]
) -> None:
    """Begin a training with the weights of a checkpoint, of any topology (collective); the optimiser begins anew."""
    by_parameter = {id(layout.parameter): layout for layout in layouts}
    boxes: list[Box] = []
    for fragment in zero.fragments():
        pieces = by_parameter[id(fragment.parameter)].pieces
        boxes += boxes_of(pieces, fragment.start, {manifest.weights_state: fragment.states["master"]})
    _load(checkpoint, boxes)
    for fragment in zero.fragments():
        if "ema" in fragment.states:
            fragment.states["ema"].copy_(fragment.states["master"])
    zero.loaded(0)


def _state_boxes(zero: ZeroState, layouts: Sequence[ParameterLayout], *, writers_only: bool) -> list[Box]:
    by_parameter = {id(layout.parameter): layout for layout in layouts}
    boxes: list[Box] = []
    for fragment in zero.fragments():
        layout = by_parameter[id(fragment.parameter)]
        if (layout.writer and zero.writer) or not writers_only:
            boxes += boxes_of(layout.pieces, fragment.start, fragment.states)
    return boxes


def _load(checkpoint: Path, boxes: Sequence[Box]) -> None:
    try:
        load({}, storage_reader=SafetensorsReader(checkpoint), planner=BoxLoadPlanner(boxes))
    except CheckpointException as error:
        raise ValueError(f"checkpoint {checkpoint} cannot be loaded: {_reasons(error)}") from error


def _reasons(error: BaseException) -> str:
    """The messages of a failed collective save or load, each once."""
    if not isinstance(error, CheckpointException):
        return str(error)
    return "; ".join(sorted({str(reason[0]) for reason in error.failures.values()}))


def _prepare(partial: Path, tokenizer: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(tokenizer, partial / TOKENIZER)


def _commit(partial: Path, target: Path, manifest: CheckpointManifest, hashes: dict[str, str]) -> None:
    write_manifest(partial, manifest, hashes)
    for path in [*partial.rglob("*"), partial]:
        sync(path)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    sync(target.parent)


def _remove(folders: Sequence[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder)
