"""Rows sent to the experts that they chose, and back: in the order of experts, over expert-parallel ranks.

No sum has an order that a run could change: a row's outputs are gathered and added, never added where they arrive.

Legend: R rows of a rank, k experts of each, M = R·k rows for experts, E experts, e of them of this rank, X hidden size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed import ProcessGroup


class Order(NamedTuple):
    """An order of M copies of R rows, k of each.

    Attributes:
        copies: int64 [M], which copy stands at each place; copy c is of row c // k.
        places: int64 [M], where each copy stands.
        each: k.
    """

    copies: Tensor
    places: Tensor
    each: int = 1

    @classmethod
    def by(cls, keys: Tensor, each: int = 1) -> Order:
        """Return the order by a key of every copy, int64 [M]; those of one key stay as they were."""
        copies = keys.argsort(stable=True)
        numbers = torch.arange(len(copies), device=copies.device)
        return cls(copies, torch.empty_like(copies).scatter_(0, copies, numbers), each)

    def spread(self, rows: Tensor) -> Tensor:
        """Return the copies [M, …] of rows [R, …] in this order."""
        found: Tensor = _Spread.apply(rows, self)
        return found

    def collect(self, copies: Tensor) -> Tensor:
        """Return rows [R, …] of copies [M, …] in this order, each the sum of its own, added in fp32."""
        found: Tensor = _Collect.apply(copies, self)
        return found


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Order) -> Tensor:
        ctx.order = order
        return rows[order.copies // order.each] if order.each > 1 else rows[order.copies]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.order.collect(gradient), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, copies: Tensor, order: Order) -> Tensor:
        ctx.order = order
        if order.each == 1:
            return copies[order.places]
        found = copies[order.places].unflatten(0, (-1, order.each))
        return found.sum(1, dtype=torch.promote_types(copies.dtype, torch.float32)).to(copies.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.order.spread(gradient), None


class Exchange:
    """Copies on their way to the ranks of their experts, and back.

    Args:
        counts: int64 [E], how many copies this rank has for each expert; they are in the order of experts.
        num_copies: M, their sum.
        group: of expert-parallel ranks, of which each has the next e experts.

    Attributes:
        counts: int64 [e], how many copies came for each expert of this rank, in the order of experts.
    """

    def __init__(self, counts: Tensor, num_copies: int, group: ProcessGroup) -> None:
        self._group = group
        self.counts = counts
        if group.size() == 1:
            return
        sent = counts.unflatten(0, (group.size(), -1))
        arriving = torch.empty_like(sent)
        dist.all_to_all_single(arriving, sent, group=group)
        # The host waits for the device: it makes the memory that copies arrive in.
        both = on_host(torch.cat([sent.sum(1), arriving.sum(1)]), 2 * num_copies)
        self._sent, self._arriving = both[: group.size()], both[group.size() :]
        self.counts = arriving.sum(0)
        experts = torch.arange(sent.shape[1], device=counts.device).repeat(group.size())
        # From the order of the ranks that they come from to that of experts.
        self._order = Order.by(experts.repeat_interleave(arriving.flatten(), output_size=sum(self._arriving)))

    def send(self, copies: Tensor) -> Tensor:
        """Return the copies, of all ranks, for this rank's experts, in the order of these."""
        if self._group.size() == 1:
            return copies
        return self._order.spread(_AllToAll.apply(copies, self._sent, self._arriving, self._group))

    def send_back(self, copies: Tensor) -> Tensor:
        """Return the copies that this rank had sent, which its experts and those of other ranks have computed."""
        if self._group.size() == 1:
            return copies
        found: Tensor = _AllToAll.apply(self._order.collect(copies), self._arriving, self._sent, self._group)
        return found


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], arriving: list[int], group: ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = (sent, arriving), group
        out = rows.new_empty((sum(arriving), *rows.shape[1:]))
        dist.all_to_all_single(out, rows.contiguous(), arriving, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        sent, arriving = ctx.sizes
        return _AllToAll.apply(gradient, arriving, sent, ctx.group), None, None, None


def on_host(counts: Tensor, total: int) -> list[int]:
    """Return counts, int64, whose sum is `total`; of a tensor without values, counts as even as they go."""
    if isinstance(counts, FakeTensor):
        # Whoever traces is shown that the host waits.
        counts.cpu()
        few, more = divmod(total, len(counts))
        return [few + (place < more) for place in range(len(counts))]
    found: list[int] = counts.tolist()
    return found
