"""Exchange rows among tensor-parallel ranks under sequence parallelism (Korthikanti et al., 2022).

Between the products of a layer, each tensor-parallel rank holds a part of the rows. They are gathered before a product
and reduced and scattered after the next one.

The rows of all streams come in `pieces` of equal length, each within one stream. A rank has its part of every piece, so
a gathered piece is whole and lies at its final position: rows need no copy between the order of ranks and that of
streams, and one piece can be sent while another is computed.

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
    """The asynchronous all-gather of the rows [N, …] of all ranks, piece by piece.

    `begin(i)` starts the gather of piece i, `piece(i)` waits for it, `rows()` waits for all.
    """

    def __init__(self, local: Tensor, pieces: int, group: ProcessGroup) -> None:
        self._local = local.contiguous().unflatten(0, (pieces, -1))
        self._group = group
        whole = self._local.new_empty((pieces, group.size() * self._local.shape[1], *local.shape[1:]))
        self._pieces = whole
        self._pending: dict[int, Any] = {}

    def begin(self, index: int) -> None:
        """Start the gather of a piece; do nothing if there is no piece of that number."""
        if index < len(self._pieces):
            self._pending[index] = dist.all_gather_into_tensor(
                self._pieces[index], self._local[index], group=self._group, async_op=True
            )

    def piece(self, index: int) -> Tensor:
        """Wait for a piece and return it."""
        self._pending.pop(index).wait()
        return self._pieces[index]

    def begin_all(self) -> None:
        """Start the gather of every piece."""
        for index in range(len(self._pieces)):
            self.begin(index)

    def rows(self) -> Tensor:
        """Wait for all pieces and return their rows."""
        for index in list(self._pending):
            self.piece(index)
        return self._pieces.flatten(0, 1)


class Reduction:
    """The asynchronous sum over ranks of rows [N, …], piece by piece.

    Each rank keeps its part [n, …] of the sum (reduce-scatter), or all of it where not `scattered` (all-reduce).
    `add(i)` starts the sum of piece i of `rows`, while the next piece is computed.
    """

    def __init__(self, rows: Tensor, pieces: int, group: ProcessGroup, *, scattered: bool) -> None:
        self.rows = rows
        self._pieces = rows.unflatten(0, (pieces, -1))
        self._group, self._scattered = group, scattered
        self._kept = self._pieces
        if scattered:
            kept = self._pieces.shape[1] // group.size()
            self._kept = rows.new_empty((pieces, kept, *rows.shape[1:]))
        self._pending: list[Any] = []

    def piece(self, index: int) -> Tensor:
        """Return the memory of a piece, to write this rank's summand into."""
        return self._pieces[index]

    def add(self, index: int) -> None:
        """Start the sum of a piece whose summand is written."""
        if self._scattered:
            work = dist.reduce_scatter_tensor(self._kept[index], self._pieces[index], group=self._group, async_op=True)
        else:
            work = dist.all_reduce(self._pieces[index], group=self._group, async_op=True)
        self._pending.append(work)

    def add_all(self) -> None:
        """Start the sum of every piece."""
        for index in range(len(self._pieces)):
            self.add(index)

    def result(self) -> Tensor:
        """Wait for every piece and return this rank's part."""
        for work in self._pending:
            work.wait()
        self._pending.clear()
        return self._kept.flatten(0, 1)


def gather_rows(local: Tensor, pieces: int, group: ProcessGroup) -> Tensor:
    """Return the rows [N, …] of all ranks; the gradient of this rank's rows [n, …] is summed over ranks."""
    rows: Tensor = _Exchange.apply(local, _gathered, _summed, pieces, group)
    return rows


def sum_rows(rows: Tensor, pieces: int, group: ProcessGroup) -> Tensor:
    """Return this rank's part [n, …] of the sum over ranks of rows [N, …]; its gradient is gathered from all ranks."""
    part: Tensor = _Exchange.apply(rows, _summed, _gathered, pieces, group)
    return part


def whole_rows(rows: Tensor, pieces: int, group: ProcessGroup, *, scattered: bool) -> Tensor:
    """Return all rows [N, …] for a function whose outputs are summed over ranks afterwards by `add_partial_rows`.

    The gradient of the rows is summed over ranks.

    scattered: whether a rank has its part [n, …] of the rows (sequence parallelism); otherwise it has all.
    """
    if group.size() == 1:
        return rows
    return gather_rows(rows, pieces, group) if scattered else copy_to_tensor_model_parallel_region(rows, group=group)


def add_partial_rows(rows: Tensor, pieces: int, group: ProcessGroup, *, scattered: bool) -> Tensor:
    """Return the sum over ranks of rows [N, …]; with `scattered`, this rank's part [n, …] of it."""
    if group.size() == 1:
        return rows
    return sum_rows(rows, pieces, group) if scattered else reduce_from_tensor_model_parallel_region(rows, group=group)


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


def _gathered(local: Tensor, pieces: int, group: ProcessGroup) -> Tensor:
    gather = Gather(local, pieces, group)
    gather.begin_all()
    return gather.rows()


def _summed(rows: Tensor, pieces: int, group: ProcessGroup) -> Tensor:
    reduction = Reduction(rows.contiguous(), pieces, group, scattered=True)
    reduction.add_all()
    return reduction.result()
