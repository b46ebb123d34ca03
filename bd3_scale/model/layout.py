"""Find where each parameter of a rank lies in the full tensors of the model, for any parallel layout.

megatron-core's `sharded_state_dict` names and places the tensors. It is read once, before DeepSpeed replaces the
parameters' memory by its own flat buffers. Checkpoints are written in terms of full tensors, which is why a run can go
on with another layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn


@dataclass(frozen=True)
class Piece:
    """A contiguous range of a parameter's elements that is one box of a full tensor.

    Attributes:
        key: name of the full tensor; all layers share one tensor whose first axis is the layer.
        start: first element of the range in the flattened parameter.
        shape: shape of the box, with as many axes as the full tensor.
        offset: offset of the box in the full tensor.
        full_shape: shape of the full tensor.
    """

    key: str
    start: int
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    full_shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class ParameterLayout:
    """The pieces of one parameter, or of a buffer that a checkpoint keeps, too.

    Attributes:
        writer: whether this rank writes it; replicas on other tensor-parallel ranks and stages do not.
        replica: number of this rank among the data-parallel replicas, over which ZeRO divides the optimiser states.
    """

    parameter: Tensor
    pieces: tuple[Piece, ...]
    writer: bool
    replica: int

    @property
    def is_trained(self) -> bool:
        """Return whether it is a parameter, which gradients change, and not a buffer."""
        return isinstance(self.parameter, nn.Parameter)


def parameter_layouts(chunks: Sequence[MegatronModule]) -> list[ParameterLayout]:
    """Return the layouts of a rank's pipeline chunks: all trained parameters, in the order of `parameters()`, and then
    the buffers that a checkpoint keeps.
    """
    by_id, buffers = {}, []
    for chunk in chunks:
        for entry in nested_values(chunk.sharded_state_dict()):
            if not isinstance(entry, ShardedTensor | ShardedTensorFactory):
                continue
            layout = ParameterLayout(entry.data, tuple(_pieces(entry)), *_replica(entry.replica_id))
            if layout.is_trained:
                by_id[id(entry.data)] = layout
            else:
                buffers.append(layout)
    named = [(name, p) for chunk in chunks for name, p in chunk.named_parameters() if p.requires_grad]
    missing = [name for name, p in named if id(p) not in by_id]
    assert not missing, f"megatron places no checkpoint tensor for {missing}"
    return [*(by_id[id(p)] for _, p in named), *buffers]


def _pieces(entry: ShardedTensor | ShardedTensorFactory) -> Iterator[Piece]:
    parameter = entry.data
    # A fused gate/up weight is a factory that makes two tensors, both views of the parameter.
    parts = (
        [entry]
        if isinstance(entry, ShardedTensor)
        else nested_values(entry.build_fn(entry.key, parameter.detach(), entry.replica_id, None))
    )
    for part in parts:
        assert part.data.is_contiguous()
        yield Piece(
            key=part.key,
            start=part.data.storage_offset() - parameter.storage_offset(),
            shape=(1,) * part.prepend_axis_num + tuple(part.local_shape),
            offset=tuple(part.global_offset),
            full_shape=tuple(part.global_shape),
        )


def _replica(replica_id: int | tuple[int, ...]) -> tuple[bool, int]:
    """Return whether a replica is the writer, and its number among the data-parallel replicas.

    The last coordinate of megatron's `replica_id` counts data-parallel replicas, the others all further ones.
    """
    if isinstance(replica_id, int):
        return replica_id == 0, 0
    return not any(replica_id[:-1]), replica_id[-1]
