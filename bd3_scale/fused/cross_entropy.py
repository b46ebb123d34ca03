"""Pieces of the cross-entropy of a vocabulary-parallel head, in the memory of the logits.

Legend: M rows, V vocabulary entries of this tensor-parallel rank.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_statistics(logits: Tensor, targets: Tensor, first_id: int, forbidden: Tensor) -> Tensor:
    """Return fp32 [3, M] of this rank's `logits` [M, V]: the highest, Σ exp(logit − highest), the target's logit.

    targets: int64 [M]; 0 stands for the logit of a target that is none of the ids from `first_id` to first_id + V.
    forbidden: bool [V], entries that count as −∞; where all are, the highest is −∞ and the sum 0.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    shown = logits.to(wide).masked_fill(forbidden, float("-inf"))
    highest = shown.amax(1)
    place = targets - first_id
    here = (place >= 0) & (place < logits.shape[1])
    own = shown.gather(1, (place * here)[:, None])[:, 0].where(here, 0)
    total = (shown - highest.clamp_min(torch.finfo(wide).min)[:, None]).exp_().sum(1)
    return torch.stack([highest, total, own])


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
    wide = torch.promote_types(logits.dtype, torch.float32)
    grad = logits.to(wide).sub_(log_total[:, None]).exp_().mul_(softmax_scale[:, None]).masked_fill_(forbidden, 0)
    place = targets - first_id
    here = (place >= 0) & (place < logits.shape[1])
    grad.scatter_add_(1, (place * here)[:, None], -(target_scale * here)[:, None])
    return logits.copy_(grad) if grad.dtype != logits.dtype else logits
