"""Plan saves and loads for torch.distributed.checkpoint (DCP) with several boxes of one tensor on a rank.

DCP's default planners derive the shards from a state dict of DTensor or ShardedTensor values, where a rank holds one
rectangle of a tensor, evenly divided. ZeRO's shares are neither: see `checkpoint.boxes`. These planners therefore pass
the boxes to DCP as write and read items and leave the state dict empty. DCP does the rest, and that is why it is used:
it joins the plans of all ranks, checks that the boxes tile each tensor, and on load finds the overlaps between the
boxes that were written and those that are wanted, so that any topology reads any other.
"""

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


def _data_by_box(boxes: Sequence[Box]) -> dict[tuple[str, tuple[int, ...]], Tensor]:
    return {(box.key, box.offset): box.data for box in boxes}


class BoxSavePlanner(DefaultSavePlanner):
    """Saves `boxes`. Together with the boxes of the other ranks they must tile every tensor, which DCP checks."""

    def __init__(self, boxes: Sequence[Box]) -> None:
        # The defaults flatten nested state dicts and rename their keys; there is no state dict here.
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._boxes = boxes
        self._data = _data_by_box(boxes)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(box) for box in self._boxes])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        # The base class looks the name up in the state dict; here the offset matters too.
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
    """Loads into the data of `boxes`, in place, from a checkpoint with any other boxes of the same tensors.

    Raises:
        ValueError: the checkpoint lacks a tensor, or holds it in another shape.
    """

    def __init__(self, boxes: Sequence[Box]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._boxes = boxes
        self._data = _data_by_box(boxes)

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
