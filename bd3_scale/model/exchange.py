"""Rows that tensor-parallel ranks share out (sequence parallelism), and the messages that they exchange them by.

Rows of all streams come in `pieces` of equal length, each of which lies within one stream. Of every piece a rank has
its own part, so that a piece which is gathered from all ranks is whole and stands where it belongs: rows need no copy
between the order of ranks and that of streams, and one piece can be on its way while another is computed.

Legend: N rows of all streams, n of them of this rank, in P pieces: N = P · ranks · (n / P). "…" are further dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup


class Gather:
    """The rows [N, …] of all ranks, whose pieces arrive one after the other.

    `begin(i)` sends for piece i, `piece(i)` waits for it, `rows()` for all.
    """

    def __init__(self, mine: Tensor, pieces: int, group: ProcessGroup) -> None:
        self._mine = mine.contiguous().unflatten(0, (pieces, -1))
        self._group = group
        whole = self._mine.new_empty((pieces, group.size() * self._mine.shape[1], *mine.shape[1:]))
        self._pieces = whole
        self._under_way: dict[int, Any] = {}

    def begin(self, index: int) -> None:
        """Send for a piece, where there is one of that number."""
        if index < len(self._pieces):
            self._under_way[index] = dist.all_gather_into_tensor(
                self._pieces[index], self._mine[index], group=self._group, async_op=True
            )

    def piece(self, index: int) -> Tensor:
        """Return a piece, once it is there."""
        self._under_way.pop(index).wait()
        return self._pieces[index]

    def begin_all(self) -> None:
        """Send for every piece."""
        for index in range(len(self._pieces)):
            self.begin(index)

    def rows(self) -> Tensor:
        """Return all rows, once they are there."""
        for index in list(self._under_way):
            self.piece(index)
        return self._pieces.flatten(0, 1)


class Reduction:
    """The sum over ranks of rows [N, …], of which each rank keeps its part [n, …] (or, not `scattered`, all).

    `add(i)` sends the finished piece i of `rows`, while the next one is computed.
    """

    def __init__(self, rows: Tensor, pieces: int, group: ProcessGroup, *, scattered: bool) -> None:
        self.rows = rows
        self._pieces = rows.unflatten(0, (pieces, -1))
        self._group, self._scattered = group, scattered
        self._kept = self._pieces
        if scattered:
            kept = self._pieces.shape[1] // group.size()
            self._kept = rows.new_empty((pieces, kept, *rows.shape[1:]))
        self._under_way: list[Any] = []

    def piece(self, index: int) -> Tensor:
        """Return the memory of a piece, for what is to be summed."""
        return self._pieces[index]

    def add(self, index: int) -> None:
        """Send a piece, which is computed."""
        if self._scattered:
            work = dist.reduce_scatter_tensor(self._kept[index], self._pieces[index], group=self._group, async_op=True)
        else:
            work = dist.all_reduce(self._pieces[index], group=self._group, async_op=True)
        self._under_way.append(work)

    def add_all(self) -> None:
        """Send every piece."""
        for index in range(len(self._pieces)):
            self.add(index)

    def result(self) -> Tensor:
        """Return this rank's part, once every piece is there."""
        for work in self._under_way:
            work.wait()
        self._under_way.clear()
        return self._kept.flatten(0, 1)


def gather_rows(mine: Tensor, pieces: int, group: ProcessGroup) -> Tensor:
    """Return the rows [N, …] of all ranks; the gradient of this rank's [n, …] is the sum of all ranks'."""
    found: Tensor = _Exchange.apply(mine, _gathered, _summed, pieces, group)
    return found


def sum_rows(rows: Tensor, pieces: int, group: ProcessGroup) -> Tensor:
    """Return this rank's part [n, …] of the sum over ranks of rows [N, …]; its gradient is gathered from all ranks."""
    found: Tensor = _Exchange.apply(rows, _summed, _gathered, pieces, group)
    return found


def whole_rows(rows: Tensor, pieces: int, group: ProcessGroup, *, shared_out: bool) -> Tensor:
    """Return all rows [N, …] for a function whose outputs are to be summed over ranks, see `add_partial_rows`; the
    gradient of a rank's own is the sum of all ranks'.

    shared_out: a rank has its part [n, …] of them; otherwise all.
    """
    if group.size() == 1:
        return rows
    return gather_rows(rows, pieces, group) if shared_out else copy_to_tensor_model_parallel_region(rows, group=group)


def add_partial_rows(rows: Tensor, pieces: int, group: ProcessGroup, *, shared_out: bool) -> Tensor:
    """Return the sum over ranks of rows [N, …]; `shared_out`: this rank's part [n, …] of it."""
    if group.size() == 1:
        return rows
    return sum_rows(rows, pieces, group) if shared_out else reduce_from_tensor_model_parallel_region(rows, group=group)


def own_rows(rows: Tensor, pieces: int, group: ProcessGroup) -> Tensor:
    """Return this rank's part [n, …] of rows [N, …]."""
    return rows.unflatten(0, (pieces, group.size(), -1))[:, group.rank()].flatten(0, 1)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        exchange: Callable[..., Tensor],
        back: Callable[..., Tensor],
        pieces: int,
        group: ProcessGroup,
    ) -> Tensor:
        ctx.back, ctx.pieces, ctx.group = back, pieces, group
        return exchange(rows, pieces, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.back(gradient, ctx.pieces, ctx.group), None, None, None, None


def _gathered(mine: Tensor, pieces: int, group: ProcessGroup) -> Tensor:
    gather = Gather(mine, pieces, group)
    gather.begin_all()
    return gather.rows()


def _summed(rows: Tensor, pieces: int, group: ProcessGroup) -> Tensor:
    reduction = Reduction(rows.contiguous(), pieces, group, scattered=True)
    reduction.add_all()
    return reduction.result()
