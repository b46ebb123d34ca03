"""Messages between data-parallel ranks beside computation: gradients as backward leaves each layer, weights as forward
comes to it.

ZeRO keeps the parameters of a group flat, one after the other, and gives each rank one stretch of them all. Gradients
are summed in fp32 from the first micro-batch to the optimiser in buffers of the same order, so that a layer's gradients
are a few stretches that go to their owners as they are, without a copy (ZeRO, Rajbhandari et al., SC 2020, section 5.2;
Megatron-LM's distributed optimiser overlaps both messages likewise).
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
    """A group of parameters that lie one after the other.

    Attributes:
        parameters: with the place where each begins.
        weights: all of them and some padding, [N], in the model's precision.
        share: elements of a rank's stretch, the last of which are padding.
        ranks: those that have these weights.
    """

    parameters: Sequence[tuple[nn.Parameter, int]]
    weights: Tensor
    share: int
    ranks: dist.ProcessGroup


class Stretch(NamedTuple):
    """Elements [start, end) of the group of that number, which one rank owns."""

    group: int
    start: int
    end: int


class GradientSums:
    """fp32 sums of gradients, reduced over the ranks that have the same weights.

    Args:
        owned: each rank gets the sums of its own stretch, as ZeRO 1 and 2 need them; otherwise all ranks get all.
        late: parameters whose gradients are not this rank's alone, and are summed elsewhere before they are reduced.
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
        self._of_layer: dict[nn.Module | None, list[Stretch]] = defaultdict(list)
        for layer, stretch in _stretches(flat, early):
            self._of_layer[layer].append(stretch)
        self._left: dict[nn.Module, int] = {}
        self._under_way: list[Any] = []
        for layer in {id(layer): layer for layer in early.values()}.values():
            layer.register_forward_pre_hook(self._watch)

    @contextmanager
    def collect(self, micro_batches: int) -> Iterator[None]:
        """Sum the gradients of so many micro-batches inside; layers that all of them have left are sent at once."""
        for group, sums in zip(self.groups, self.sums, strict=True):
            sums.zero_()
            for parameter, start in group.parameters:
                stretch = sums[start : start + parameter.numel()].view(parameter.shape)
                # Products add to the one, autograd to the other: both are the same memory.
                parameter.grad = parameter.main_grad = stretch  # type: ignore[attr-defined]
        self._left = {layer: micro_batches for layer in self._of_layer if layer is not None}
        yield
        if any(self._left.values()):
            raise RuntimeError("gradients of a layer were not sent: its input needs a gradient in every micro-batch")
        self._send(self._of_layer[None])
        for work in self._under_way:
            work.wait()
        self._under_way.clear()
        self._left = {}
        for group in self.groups:
            for parameter, _ in group.parameters:
                parameter.grad = parameter.main_grad = None  # type: ignore[attr-defined]

    def _watch(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0]
        # A layer that is computed again in backward is watched already.
        if layer in self._left and x.requires_grad and torch._C._current_autograd_node() is None:
            # The gradient of its input is the last thing that a layer's backward makes: autograd adds to the gradients
            # of parameters as soon as they are there.
            x.register_hook(partial(self._leave, layer))

    def _leave(self, layer: nn.Module, _: Tensor) -> None:
        self._left[layer] -= 1
        if not self._left[layer]:
            self._send(self._of_layer[layer])

    def _send(self, stretches: Iterable[Stretch]) -> None:
        for group, start, end in stretches:
            sums, ranks = self.sums[group][start:end], self.groups[group].ranks
            if ranks.size() == 1:
                continue
            if not self._owned:
                self._under_way.append(dist.all_reduce(sums, group=ranks, async_op=True))
                continue
            owner = start // self.groups[group].share
            self._under_way.append(dist.reduce(sums, group_dst=owner, group=ranks, async_op=True))


class WeightGather:
    """The weights that other ranks updated, sent for in the order in which forward needs them.

    `wait` must be called before anything but forward reads weights; forward waits for those of each part by itself.
    """

    def __init__(self, flat: Sequence[FlatGroup], chunks: Chunks) -> None:
        self._flat = flat
        parts = _layers(chunks) | _heads(chunks)
        self._order = list(_stretches(flat, parts))
        self._order.sort(key=lambda item: _forward_order(item[0], chunks))
        self._under_way: dict[nn.Module | None, list[Any]] = defaultdict(list)
        for part in {id(part): part for part in parts.values()}.values():
            part.register_forward_pre_hook(lambda module, _: self._arrived(module))
        for chunk in chunks:
            chunk.register_forward_pre_hook(lambda *_: self._arrived(None))

    def begin(self) -> None:
        """Send this rank's weights, and for those of the others."""
        for part, (group, start, end) in self._order:
            flat = self._flat[group]
            if flat.ranks.size() == 1:
                continue
            work = dist.broadcast(
                flat.weights[start:end], group_src=start // flat.share, group=flat.ranks, async_op=True
            )
            self._under_way[part].append(work)

    def wait(self) -> None:
        """Wait for all weights that are under way."""
        for part in list(self._under_way):
            self._arrived(part)

    def _arrived(self, part: nn.Module | None) -> None:
        for work in self._under_way.pop(part, ()):
            work.wait()


def _layers(chunks: Chunks) -> dict[int, nn.Module]:
    """Return the layer of each parameter that belongs to one, by the parameter's id."""
    return {id(p): layer for chunk in chunks for layer in chunk.decoder.layers for p in layer.parameters()}


def _heads(chunks: Chunks) -> dict[int, nn.Module]:
    return {
        id(p): chunk.output_layer for chunk in chunks if chunk.post_process for p in chunk.output_layer.parameters()
    }


def _forward_order(part: nn.Module | None, chunks: Chunks) -> int:
    """Return when forward comes to a part; what belongs to none is needed first."""
    layers: list[nn.Module] = [layer for chunk in chunks for layer in chunk.decoder.layers]
    if part is None:
        return 0
    return 1 + (layers.index(part) if part in layers else len(layers))


def _stretches(flat: Sequence[FlatGroup], parts: dict[int, nn.Module]) -> Iterator[tuple[nn.Module | None, Stretch]]:
    """Yield the stretches of each part, cut where their owner changes; None: of what belongs to no part, and padding.

    A group of vectors, norms and biases, belongs to none: messages by layer would take longer than they could save.
    """
    for number, group in enumerate(flat):
        of_vectors = all(parameter.ndim < 2 for parameter, _ in group.parameters)
        starts = [start for _, start in group.parameters] + [len(group.weights)]
        owners = [None if of_vectors else parts.get(id(parameter)) for parameter, _ in group.parameters]
        first = 0
        for place, owner in enumerate(owners):
            if place + 1 == len(owners) or owners[place + 1] is not owner:
                for start, end in _by_owner(starts[first], starts[place + 1], group.share):
                    yield owner, Stretch(number, start, end)
                first = place + 1


def _by_owner(start: int, end: int, share: int) -> Iterator[tuple[int, int]]:
    while start < end:
        border = min(end, (start // share + 1) * share)
        yield start, border
        start = border
