"""Plans for torch.distributed.checkpoint: any number of boxes of one tensor on a rank, on save and on load."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from bd3_scale.checkpoint.boxes import Box


def _by_place(boxes: Sequence[Box]) -> dict[tuple[str, tuple[int, ...]], Tensor]:
    return {(box.key, box.offset): box.data for box in boxes}


class BoxSavePlanner(DefaultSavePlanner):
    """Saves `boxes`; together with those of the other ranks they must tile every tensor, which torch checks."""

    def __init__(self, boxes: Sequence[Box]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._boxes = boxes
        self._data = _by_place(boxes)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(box) for box in self._boxes])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._data[index.fqn, tuple(index.offset or ())]


def _write_item(box: Box) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(box.key, torch.Size(box.offset)),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=torch.Size(box.offset), sizes=box.data.shape),
            properties=TensorProperties.create_from_tensor(box.data),
            size=torch.Size(box.full_shape),
        ),
    )


class BoxLoadPlanner(DefaultLoadPlanner):
    """Loads into the data of `boxes`, in place, whatever boxes the checkpoint was written in.

    Raises:
        ValueError: the checkpoint lacks a tensor, or holds it in another shape.
    """

    def __init__(self, boxes: Sequence[Box]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._boxes = boxes
        self._data = _by_place(boxes)

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        by_tensor = defaultdict(list)
        for box in self._boxes:
            by_tensor[box.key].append(box)
        reads = []
        for key, boxes in by_tensor.items():
            stored = self.metadata.state_dict_metadata.get(key)
            if not isinstance(stored, TensorStorageMetadata):
                raise ValueError(f"the checkpoint holds no tensor {key}")
            if tuple(stored.size) != boxes[0].full_shape:
                raise ValueError(
                    f"{key} has shape {tuple(stored.size)} in the checkpoint and {boxes[0].full_shape} in the model"
                )
            chunks = [ChunkStorageMetadata(torch.Size(box.offset), box.data.shape) for box in boxes]
            reads += create_read_items_for_chunk_list(key, stored, chunks)
        return LoadPlan(reads)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._data[index.fqn, tuple(index.offset or ())]
