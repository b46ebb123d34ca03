"""From a batch of clean sequences to what the two-stream forward takes.

Everything is computed on the host, with the data: the device never waits to learn how many rows are masked.

Shapes: B sequences, L data tokens a sequence, M masked tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bd3_scale.data.batch import Batch
from bd3_scale.diffusion.nelbo import loss_weight
from bd3_scale.diffusion.noise import Noise


@dataclass(frozen=True)
class NoisyBatch:
    """Inputs of `BlockDiffusionTransformer.forward` and the loss weight of each masked token.

    Attributes:
        noisy_BL, clean_BL, positions_BL: int64 [B, L].
        spans: int32 [3, B, L].
        rows_M: int64 [M], the masked tokens as indices into the flattened [B, L].
        weight_M: float32 [M].
    """

    noisy_BL: Tensor
    clean_BL: Tensor
    positions_BL: Tensor
    spans: Tensor
    rows_M: Tensor
    weight_M: Tensor


def corrupt(batch: Batch, noise: Noise, spans: Tensor, *, mask_id: int, device: torch.device) -> NoisyBatch:
    """Replace the masked tokens of `batch` by `mask_id` and move everything to `device`."""
    rows = noise.masked.flatten().nonzero()[:, 0]
    host = (
        batch.tokens.masked_fill(noise.masked, mask_id),
        batch.tokens,
        batch.positions,
        spans,
        rows,
        loss_weight(noise).flatten()[rows],
    )
    return NoisyBatch(*(tensor.to(device, non_blocking=True) for tensor in host))
