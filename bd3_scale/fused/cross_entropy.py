"""Pieces of the cross-entropy of a vocabulary-parallel head, in the memory of the logits.

Legend: M rows, V vocabulary entries of this tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bd3_scale.fused import ops
from bd3_scale.fused.parts import parts


def row_statistics(logits: Tensor, targets: Tensor, first_id: int, forbidden: Tensor) -> Tensor:
    """Return fp32 [3, M] of this rank's `logits` [M, V]: the highest, Σ exp(logit − highest), the target's logit.

    targets: int64 [M]; 0 stands for the logit of a target that is none of the V ids from `first_id` on.
    forbidden: bool [V], entries that count as −∞; where all are, the highest is −∞ and the sum 0.
    """
    if ops.kernels_take(logits):
        return ops.row_statistics(logits, targets, first_id, forbidden)
    penalty = _penalty(logits, forbidden)
    place, here = _places(targets, first_id, logits.shape[1])
    found = torch.empty((3, len(logits)), dtype=penalty.dtype, device=logits.device)
    for rows, shown in _in_cache(logits):
        shown.copy_(logits[rows]).add_(penalty)
        highest = torch.amax(shown, 1, out=found[0, rows])
        found[2, rows] = shown.gather(1, place[rows, None])[:, 0].where(here[rows], 0)
        # Of a row without any entry −∞ itself would make a NaN.
        torch.sum(shown.sub_(highest.clamp_min(torch.finfo(shown.dtype).min)[:, None]).exp_(), 1, out=found[1, rows])
    return found


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

    log_total, softmax_scale, target_scale: fp32 [M]; the others are those of `row_statistics`. Forbidden entries get 0.
    """
    if ops.kernels_take(logits):
        ops.logit_gradient_(logits, targets, first_id, forbidden, log_total, softmax_scale, target_scale)
        return logits
    penalty = _penalty(logits, forbidden)
    place, here = _places(targets, first_id, logits.shape[1])
    for rows, shown in _in_cache(logits):
        shown = logits[rows] if logits.dtype == shown.dtype else shown.copy_(logits[rows])
        shown.add_(penalty).sub_(log_total[rows, None]).exp_().mul_(softmax_scale[rows, None])
        at = place[rows, None]
        shown.scatter_(1, at, shown.gather(1, at) - (target_scale[rows] * here[rows])[:, None])
        if logits.dtype != shown.dtype:
            logits[rows] = shown
    return logits


def _penalty(logits: Tensor, forbidden: Tensor) -> Tensor:
    """Return what makes forbidden entries −∞ where it is added: fp32 [V], fp64 where logits are."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.zeros(len(forbidden), dtype=wide, device=logits.device).masked_fill_(forbidden, float("-inf"))


def _places(targets: Tensor, first_id: int, size: int) -> tuple[Tensor, Tensor]:
    """Return the columns of targets [M], 0 for those of other ranks, and which are none of these."""
    place = targets - first_id
    here = (place >= 0) & (place < size)
    return place * here, here


def _in_cache(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield parts of rows, and memory for as many rows in fp32 (fp64 where logits are), the same each time."""
    memory: Tensor | None = None
    for rows in parts(logits):
        if memory is None:
            wide = torch.promote_types(logits.dtype, torch.float32)
            memory = torch.empty((rows.stop, logits.shape[1]), dtype=wide, device=logits.device)
        yield rows, memory[: rows.stop - rows.start]
