"""Compute the statistics and the gradient of a vocabulary-parallel cross-entropy, in the memory of the logits.

Legend: M rows, V vocabulary entries of this tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bd3_scale.fused import ops
from bd3_scale.fused.parts import parts


def row_statistics(logits: Tensor, targets: Tensor, first_id: int, forbidden: Tensor) -> Tensor:
    """Return fp32 [3, M] of this rank's `logits` [M, V]: the maximum, Σ exp(logit − maximum), the target's logit.

    targets: int64 [M]. The third number is 0 for a target that is none of the V ids from `first_id` on, so that a sum
    over tensor-parallel ranks gives the target's logit.
    forbidden: bool [V], entries that count as −∞; where all are, the maximum is −∞ and the sum 0.
    """
    if ops.kernels_take(logits):
        return ops.row_statistics(logits, targets, first_id, forbidden)
    penalty = _penalty(logits, forbidden)
    column, is_local = _columns(targets, first_id, logits.shape[1])
    statistics = torch.empty((3, len(logits)), dtype=penalty.dtype, device=logits.device)
    for rows, buffer in _in_cache(logits):
        buffer.copy_(logits[rows]).add_(penalty)
        highest = torch.amax(buffer, 1, out=statistics[0, rows])
        statistics[2, rows] = buffer.gather(1, column[rows, None])[:, 0].where(is_local[rows], 0)
        # In a row where every entry is −∞ the difference −∞ − (−∞) would be nan.
        finite = highest.clamp_min(torch.finfo(buffer.dtype).min)[:, None]
        torch.sum(buffer.sub_(finite).exp_(), 1, out=statistics[1, rows])
    return statistics


def logit_gradient_(
    logits: Tensor,
    targets: Tensor,
    first_id: int,
    forbidden: Tensor,
    log_total: Tensor,
    softmax_scale: Tensor,
    target_scale: Tensor,
) -> Tensor:
    """Turn `logits` [M, V] into exp(logit − log_total) · softmax_scale − [is the target] · target_scale, in place.

    This is the gradient of the cross-entropy by the logits: softmax minus one-hot, with a scale for each of the two.
    In place, because logits and their gradient together might not fit into memory.

    log_total, softmax_scale, target_scale: fp32 [M]; the other arguments are those of `row_statistics`. Forbidden
    entries get 0.
    """
    if ops.kernels_take(logits):
        ops.logit_gradient_(logits, targets, first_id, forbidden, log_total, softmax_scale, target_scale)
        return logits
    penalty = _penalty(logits, forbidden)
    column, is_local = _columns(targets, first_id, logits.shape[1])
    for rows, memory in _in_cache(logits):
        buffer = logits[rows] if logits.dtype == memory.dtype else memory.copy_(logits[rows])
        buffer.add_(penalty).sub_(log_total[rows, None]).exp_().mul_(softmax_scale[rows, None])
        at = column[rows, None]
        buffer.scatter_(1, at, buffer.gather(1, at) - (target_scale[rows] * is_local[rows])[:, None])
        if logits.dtype != buffer.dtype:
            logits[rows] = buffer
    return logits


def _penalty(logits: Tensor, forbidden: Tensor) -> Tensor:
    """Return the summand that makes forbidden entries −∞: fp32 [V], or fp64 for fp64 logits."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.zeros(len(forbidden), dtype=wide, device=logits.device).masked_fill_(forbidden, float("-inf"))


def _columns(targets: Tensor, first_id: int, size: int) -> tuple[Tensor, Tensor]:
    """Return the columns of targets [M], 0 for those of other ranks, and whether each target is on this rank."""
    column = targets - first_id
    is_local = (column >= 0) & (column < size)
    return column * is_local, is_local


def _in_cache(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield parts of the rows, each with a buffer for its rows in fp32 (or fp64); the buffer's memory is reused.

    The buffer stays in the CPU's cache, where the several operators of a part then find it.
    """
    memory: Tensor | None = None
    for rows in parts(logits):
        if memory is None:
            wide = torch.promote_types(logits.dtype, torch.float32)
            memory = torch.empty((rows.stop, logits.shape[1]), dtype=wide, device=logits.device)
        yield rows, memory[: rows.stop - rows.start]
