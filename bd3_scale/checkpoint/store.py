"""Save and load the checkpoints of a run; see `checkpoint.folder` for where they lie."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from bd3_scale.checkpoint.boxes import Box, boxes_of
from bd3_scale.checkpoint.folder import LATEST, PARTIAL, list_checkpoints, name_latest, step_of
from bd3_scale.checkpoint.manifest import (
    TOKENIZER,
    CheckpointManifest,
    FileRecord,
    damaged_files,
    read_manifest,
    weights_state,
    write_manifest,
)
from bd3_scale.checkpoint.planner import BoxLoadPlanner, BoxSavePlanner
from bd3_scale.checkpoint.storage import SafetensorsReader, SafetensorsWriter
from bd3_scale.checkpoint.verify import surplus
from bd3_scale.model.layout import ParameterLayout
from bd3_scale.parallel.collective import gather_values, on_rank_zero
from bd3_scale.parallel.zero import ZeroState
from bd3_scale.recipe.schema import CheckpointRecipe
from bd3_scale.resilience import faults
from bd3_scale.resilience.files import sync

_LOG = logging.getLogger(__name__)


def boxes_to_save(zero: ZeroState, layouts: Sequence[ParameterLayout]) -> list[Box]:
    """Return this rank's part of a checkpoint: views of the optimiser's states."""
    return _state_boxes(zero, layouts, weights_state(zero.names), writers_only=True)


def save_boxes(
    folder: Path,
    manifest: CheckpointManifest,
    boxes: Sequence[Box],
    *,
    tokenizer: Path,
    keep: CheckpointRecipe,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write the boxes of all ranks as one checkpoint, then delete those that `keep` lets go (collective over `group`).

    Raises:
        OSError: it could not be written; older checkpoints are unchanged.
    """
    target = folder / f"step-{manifest.step:08d}"
    partial = folder / f"{PARTIAL}{target.name}"
    try:
        on_rank_zero(lambda: _prepare(partial, tokenizer, manifest.step), group)
        writer = SafetensorsWriter(partial, dist.get_rank(), manifest.step)
        save({}, storage_writer=writer, planner=BoxSavePlanner(boxes), process_group=group)
        mine = {name: record.model_dump() for name, record in writer.written.items()}
        written = {name: FileRecord(**record) for rank in gather_values(mine, group) for name, record in rank.items()}
        on_rank_zero(lambda: _seal(partial, manifest, written), group)
        if keep.verify == "full" and (damaged := "; ".join(filter(None, gather_values(_read_back(partial), group)))):
            raise OSError(f"these files do not read back as they were written: {damaged}")
        on_rank_zero(lambda: _commit(partial, target, manifest.step), group)
    except (CheckpointException, ValueError, OSError) as error:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"the checkpoint of step {manifest.step} could not be written to {folder}: {_reasons(error)}; "
            "older ones are unchanged"
        ) from error
    # The checkpoint is complete; an error from here on must not count as a failed save.
    on_rank_zero(lambda: _delete_surplus(folder, keep, manifest.step), group)
    return target


def load_training_state(
    checkpoint: Path, manifest: CheckpointManifest, zero: ZeroState, layouts: Sequence[ParameterLayout]
) -> None:
    """Load masters, optimiser states and moving average in place, whatever layout this run has (collective).

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    missing = set(zero.names) - set(manifest.states)
    if missing:
        raise ValueError(
            f"{checkpoint} holds no {', '.join(sorted(missing))}: set optimizer.family and optimizer.ema_decay as in "
            "the run that wrote it"
        )
    _load(checkpoint, _state_boxes(zero, layouts, manifest.weights_state, writers_only=False))
    zero.loaded(manifest.step - manifest.skipped)


def load_weights(
    checkpoint: Path, manifest: CheckpointManifest, layouts: Sequence[ParameterLayout], *, alone: bool = False
) -> None:
    """Load a model without its optimiser, in the model's dtype (collective, unless `alone`).

    The weights are the moving average if the checkpoint has one, else the masters.
    """
    state = manifest.weights_state
    boxes = [b for layout in layouts for b in boxes_of(layout.pieces, 0, {state: layout.parameter.data.view(-1)})]
    _load(checkpoint, boxes, alone=alone)


def load_initial_weights(
    checkpoint: Path, manifest: CheckpointManifest, zero: ZeroState, layouts: Sequence[ParameterLayout]
) -> None:
    """Load the weights of a checkpoint of any topology to start a training (collective); the optimiser starts anew."""
    by_parameter = {id(layout.parameter): layout for layout in layouts}
    boxes: list[Box] = []
    for fragment in zero.fragments():
        pieces = by_parameter[id(fragment.parameter)].pieces
        boxes += boxes_of(pieces, fragment.start, {manifest.weights_state: fragment.states["master"]})
    boxes += _untrained_boxes([layout for layout in layouts if not layout.is_trained], manifest.weights_state)
    _load(checkpoint, boxes)
    for fragment in zero.fragments():
        if "ema" in fragment.states:
            fragment.states["ema"].copy_(fragment.states["master"])
    zero.loaded(0)


def _state_boxes(zero: ZeroState, layouts: Sequence[ParameterLayout], weights: str, *, writers_only: bool) -> list[Box]:
    """Return boxes of the optimiser's states; parameters without a gradient join the state `weights`."""
    by_parameter = {id(layout.parameter): layout for layout in layouts}
    boxes: list[Box] = []
    for fragment in zero.fragments():
        layout = by_parameter[id(fragment.parameter)]
        # Where ZeRO divides the states each data-parallel rank has its own share; else replicas hold equal copies, and
        # the first one writes.
        if not writers_only or (layout.writer and (zero.divided or layout.replica == 0)):
            boxes += boxes_of(layout.pieces, fragment.start, fragment.states)
    others = [layout for layout in layouts if not layout.is_trained]
    if writers_only:
        others = [layout for layout in others if layout.writer and layout.replica == 0]
    return boxes + _untrained_boxes(others, weights)


def _untrained_boxes(layouts: Sequence[ParameterLayout], state: str) -> list[Box]:
    return [box for layout in layouts for box in boxes_of(layout.pieces, 0, {state: layout.parameter.view(-1)})]


def _load(checkpoint: Path, boxes: Sequence[Box], *, alone: bool = False) -> None:
    try:
        load({}, storage_reader=SafetensorsReader(checkpoint), planner=BoxLoadPlanner(boxes), no_dist=alone)
    except CheckpointException as error:
        raise ValueError(f"checkpoint {checkpoint} cannot be loaded: {_reasons(error)}") from error


def _reasons(error: BaseException) -> str:
    """Return the messages of a failed collective save or load, or of a failed copy of a folder, each once."""
    if isinstance(error, shutil.Error):
        return "; ".join(sorted({str(why) for _, _, why in error.args[0]}))
    if not isinstance(error, CheckpointException):
        return str(error)
    return "; ".join(sorted({str(reason[0]) for reason in error.failures.values()}))


def _prepare(partial: Path, tokenizer: Path, step: int) -> None:
    faults.reach("save.begin", step=step)
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(tokenizer, partial / TOKENIZER, ignore=shutil.ignore_patterns(".*"))


def _seal(partial: Path, manifest: CheckpointManifest, written: Mapping[str, FileRecord]) -> None:
    faults.reach("save.commit", step=manifest.step, folder=partial)
    write_manifest(partial, manifest, written)
    # A checkpoint that cannot be read must not get its final name.
    read_manifest(partial)
    # The files and the folder reach the disk before the rename does: after a power cut a renamed folder is complete.
    for path in [*partial.rglob("*"), partial]:
        sync(path)


def _read_back(partial: Path) -> str:
    """Read this rank's share of the files again and return which are damaged, "" if none.

    Disks and network file systems have returned other bytes than were written, without an error; older checkpoints are
    deleted after this one, so it must be known to be readable first.
    """
    try:
        damaged = damaged_files(partial, read_manifest(partial), slice(dist.get_rank(), None, dist.get_world_size()))
    except (ValueError, OSError) as error:
        return str(error)
    return ", ".join(damaged)


def _commit(partial: Path, target: Path, step: int) -> None:
    faults.reach("save.rename", step=step, folder=partial)
    if target.exists():
        _remove(target)
    partial.rename(target)
    sync(target.parent)


def _delete_surplus(folder: Path, keep: CheckpointRecipe, step: int) -> None:
    try:
        faults.reach("save.link", step=step)
        name_latest(folder)
    except OSError as error:
        _LOG.warning("%s cannot be updated to step %d: %s", folder / LATEST, step, error)
    try:
        faults.reach("save.remove", step=step)
        by_step = {number: path for path in list_checkpoints(folder) if (number := step_of(path)) is not None}
        named = (folder / LATEST).read_text().strip() if (folder / LATEST).is_file() else ""
        for path in surplus(by_step, keep, folder.parent):
            # If `latest` could not be written, the checkpoint that it names stays.
            if path.name != named:
                _remove(path)
    except (OSError, ValueError) as error:
        _LOG.warning("surplus checkpoints of %s cannot be deleted: %s", folder, error)


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint, after a rename: one that is half deleted must not look like a checkpoint."""
    aside = checkpoint.with_name(f"{PARTIAL}removed-{checkpoint.name}")
    checkpoint.rename(aside)
    shutil.rmtree(aside)
