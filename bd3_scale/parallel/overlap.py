"""Overlap the messages between data-parallel ranks with computation.

Gradients are sent when the last backward has passed a layer, and weights are awaited when the next forward comes to it.

ZeRO keeps the parameters of a group in one flat buffer and gives each rank a contiguous shard of it. Gradients are
summed in fp32 over all micro-batches, in buffers of the same order. A layer's gradients are then a few ranges of such a
buffer, which are reduced to their owners without a copy (ZeRO: Rajbhandari et al., SC 2020, section 5.2; Megatron-LM's
distributed optimiser overlaps the same messages).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bd3_scale.model.build import Chunks


@dataclass(frozen=True)
class FlatGroup:
    """A group of parameters that lie one after the other in a flat buffer.

    Attributes:
        parameters: each with its first element in the buffer.
        weights: the buffer, [N]: all parameters and some padding, in the model's precision.
        share: number of elements of a rank's shard; the last shard ends with padding.
        ranks: the ranks that have these weights.
    """

    parameters: Sequence[tuple[nn.Parameter, int]]
    weights: Tensor
    share: int
    ranks: dist.ProcessGroup


class Range(NamedTuple):
    """Elements [start, end) of a group, by the group's number; they belong to one rank's shard."""

    group: int
    start: int
    end: int


class GradientSums:
    """fp32 sums of gradients, reduced over the ranks that have the same weights.

    Args:
        owned: whether each rank gets only the sums of its own shard, as ZeRO 1 and 2 need them; otherwise all ranks get
            all sums.
        late: parameters whose gradients are first summed over other ranks (tensor-parallel, tied embeddings), and so
            are reduced after all others.
    """

    def __init__(
        self,
        flat: Sequence[FlatGroup],
        chunks: Chunks,
        *,
        owned: bool,
        late: Iterable[nn.Parameter],
    ) -> None:
        self.groups, self._owned = flat, owned
        self.sums = [torch.zeros_like(group.weights, dtype=torch.float32) for group in flat]
        early = _layers(chunks) | _heads(chunks)
        for parameter in late:
            early.pop(id(parameter), None)
        self._of_layer: dict[nn.Module | None, list[Range]] = defaultdict(list)
        for layer, part in _ranges(flat, early):
            self._of_layer[layer].append(part)
        self._remaining: dict[nn.Module, int] = {}
        self._pending: list[Any] = []
        for layer in {id(layer): layer for layer in early.values()}.values():
            layer.register_forward_pre_hook(self._watch_backward)

    @contextmanager
    def collect(self, micro_batches: int) -> Iterator[None]:
        """Sum the gradients of `micro_batches` backward passes inside; reduce a layer's once all have passed it."""
        for group, sums in zip(self.groups, self.sums, strict=True):
            sums.zero_()
            for parameter, start in group.parameters:
                part = sums[start : start + parameter.numel()].view(parameter.shape)
                # Our products add to `main_grad`, autograd adds to `grad`; both are the same memory.
                parameter.grad = parameter.main_grad = part  # type: ignore[attr-defined]
        self._remaining = {layer: micro_batches for layer in self._of_layer if layer is not None}
        yield
        if any(self._remaining.values()):
            raise RuntimeError("gradients of a layer were not sent: its input needs a gradient in every micro-batch")
        self._send(self._of_layer[None])
        for work in self._pending:
            work.wait()
        self._pending.clear()
        self._remaining = {}
        for group in self.groups:
            for parameter, _ in group.parameters:
                parameter.grad = parameter.main_grad = None  # type: ignore[attr-defined]

    def _watch_backward(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0]
        # Inside of backward this is a recomputation of the layer, whose input has a hook already.
        if layer in self._remaining and x.requires_grad and torch._C._current_autograd_node() is None:
            # The gradient of its input is the last that a layer's backward computes: when this hook is called, the
            # gradients of the layer's parameters have been added to their sums.
            x.register_hook(partial(self._passed, layer))

    def _passed(self, layer: nn.Module, _: Tensor) -> None:
        self._remaining[layer] -= 1
        if not self._remaining[layer]:
            self._send(self._of_layer[layer])

    def _send(self, ranges: Iterable[Range]) -> None:
        for group, start, end in ranges:
            sums, ranks = self.sums[group][start:end], self.groups[group].ranks
            if ranks.size() == 1:
                continue
            if not self._owned:
                self._pending.append(dist.all_reduce(sums, group=ranks, async_op=True))
                continue
            owner = start // self.groups[group].share
            self._pending.append(dist.reduce(sums, group_dst=owner, group=ranks, async_op=True))


class WeightGather:
    """The gathering of the weights that other ranks updated, in the order in which the next forward needs them.

    Forward waits for the weights of each part in hooks. `wait` must be called before anything else reads weights.
    """

    def __init__(self, flat: Sequence[FlatGroup], chunks: Chunks) -> None:
        self._flat = flat
        parts = _layers(chunks) | _heads(chunks)
        self._order = list(_ranges(flat, parts))
        self._order.sort(key=lambda item: _forward_order(item[0], chunks))
        self._pending: dict[nn.Module | None, list[Any]] = defaultdict(list)
        for part in {id(part): part for part in parts.values()}.values():
            part.register_forward_pre_hook(lambda module, _: self._arrived(module))
        for chunk in chunks:
            chunk.register_forward_pre_hook(lambda *_: self._arrived(None))

    def begin(self) -> None:
        """Start to broadcast this rank's weights and to receive those of the others."""
        for part, (group, start, end) in self._order:
            flat = self._flat[group]
            if flat.ranks.size() == 1:
                continue
            work = dist.broadcast(
                flat.weights[start:end], group_src=start // flat.share, group=flat.ranks, async_op=True
            )
            self._pending[part].append(work)

    def wait(self) -> None:
        """Wait for all weights."""
        for part in list(self._pending):
            self._arrived(part)

    def _arrived(self, part: nn.Module | None) -> None:
        for work in self._pending.pop(part, ()):
            work.wait()


def _layers(chunks: Chunks) -> dict[int, nn.Module]:
    """Return the layer of each parameter of a decoder layer, by the parameter's id."""
    return {id(p): layer for chunk in chunks for layer in chunk.decoder.layers for p in layer.parameters()}


def _heads(chunks: Chunks) -> dict[int, nn.Module]:
    return {
        id(p): chunk.output_layer for chunk in chunks if chunk.post_process for p in chunk.output_layer.parameters()
    }


def _forward_order(part: nn.Module | None, chunks: Chunks) -> int:
    """Return the rank of a part in the order of the forward; what belongs to no part is needed first."""
    layers: list[nn.Module] = [layer for chunk in chunks for layer in chunk.decoder.layers]
    if part is None:
        return 0
    return 1 + (layers.index(part) if part in layers else len(layers))


def _ranges(flat: Sequence[FlatGroup], parts: dict[int, nn.Module]) -> Iterator[tuple[nn.Module | None, Range]]:
    """Yield the ranges of each part, cut at the borders of shards; None: what belongs to no part, and padding.

    Groups of vectors (norms and biases) belong to no part: so small messages for each layer would cost more time than
    their overlap could save.
    """
    for number, group in enumerate(flat):
        of_vectors = all(parameter.ndim < 2 for parameter, _ in group.parameters)
        starts = [start for _, start in group.parameters] + [len(group.weights)]
        owners = [None if of_vectors else parts.get(id(parameter)) for parameter, _ in group.parameters]
        first = 0
        for index, owner in enumerate(owners):
            if index + 1 == len(owners) or owners[index + 1] is not owner:
                for start, end in _by_owner(starts[first], starts[index + 1], group.share):
                    yield owner, Range(number, start, end)
                first = index + 1


def _by_owner(start: int, end: int, share: int) -> Iterator[tuple[int, int]]:
    while start < end:
        border = min(end, (start // share + 1) * share)
        yield start, border
        start = border
