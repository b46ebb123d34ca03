"""Send rows to the experts that the router chose, in the order of experts and over expert-parallel ranks, and back.

All sums have a fixed order, so that a run can be repeated bitwise: the k outputs of a row are gathered and then added.
A scatter with atomic additions would add them in the order of their arrival.

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
    """A permutation of M copies of R rows, k copies of each row.

    Attributes:
        copies: int64 [M], the copy at each position; copy c is of row c // k.
        positions: int64 [M], the position of each copy: the inverse permutation.
        each: k.
    """

    copies: Tensor
    positions: Tensor
    each: int = 1

    @classmethod
    def by(cls, keys: Tensor, each: int = 1) -> Order:
        """Return the order by a key of every copy, int64 [M]; copies of equal keys keep their order."""
        copies = keys.argsort(stable=True)
        numbers = torch.arange(len(copies), device=copies.device)
        return cls(copies, torch.empty_like(copies).scatter_(0, copies, numbers), each)

    def spread(self, rows: Tensor) -> Tensor:
        """Return the copies [M, …] of rows [R, …] in this order."""
        copies: Tensor = _Spread.apply(rows, self)
        return copies

    def collect(self, copies: Tensor) -> Tensor:
        """Return rows [R, …], each the sum in fp32 of its k copies, for copies [M, …] in this order."""
        rows: Tensor = _Collect.apply(copies, self)
        return rows


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
            return copies[order.positions]
        of_rows = copies[order.positions].unflatten(0, (-1, order.each))
        return of_rows.sum(1, dtype=torch.promote_types(copies.dtype, torch.float32)).to(copies.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.order.spread(gradient), None


class Exchange:
    """The all-to-all exchange of copies with the ranks of their experts.

    Args:
        counts: int64 [E], the number of this rank's copies for each expert; the copies are in the order of experts.
        num_copies: M, their sum.
        group: the expert-parallel ranks; each has the next e experts.

    Attributes:
        counts: int64 [e], the number of copies from all ranks for each expert of this rank.
    """

    def __init__(self, counts: Tensor, num_copies: int, group: ProcessGroup) -> None:
        self._group = group
        self.counts = counts
        if group.size() == 1:
            return
        sent = counts.unflatten(0, (group.size(), -1))
        arriving = torch.empty_like(sent)
        dist.all_to_all_single(arriving, sent, group=group)
        # The host must wait for the device here: it allocates the memory that the copies arrive in.
        both = on_host(torch.cat([sent.sum(1), arriving.sum(1)]), 2 * num_copies)
        self._sent, self._arriving = both[: group.size()], both[group.size() :]
        self.counts = arriving.sum(0)
        experts = torch.arange(sent.shape[1], device=counts.device).repeat(group.size())
        # Copies arrive in the order of the sending ranks; this sorts them by expert.
        self._order = Order.by(experts.repeat_interleave(arriving.flatten(), output_size=sum(self._arriving)))

    def send(self, copies: Tensor) -> Tensor:
        """Return the copies from all ranks for this rank's experts, in the order of experts."""
        if self._group.size() == 1:
            return copies
        return self._order.spread(_AllToAll.apply(copies, self._sent, self._arriving, self._group))

    def send_back(self, copies: Tensor) -> Tensor:
        """Return the outputs of the experts of all ranks for the copies that this rank had sent."""
        if self._group.size() == 1:
            return copies
        returned: Tensor = _AllToAll.apply(self._order.collect(copies), self._arriving, self._sent, self._group)
        return returned


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
    """Return int64 counts, whose sum is `total`, as a list; a fake tensor has no values and gives equal counts."""
    if isinstance(counts, FakeTensor):
        # A trace (`plan`) must show the synchronisation that `tolist` is.
        counts.cpu()
        few, more = divmod(total, len(counts))
        return [few + (index < more) for index in range(len(counts))]
    values: list[int] = counts.tolist()
    return values
