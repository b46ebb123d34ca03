"""The loss of one micro-batch."""

from __future__ import annotations

from torch import Tensor

from bd3_scale.data.corrupt import NoisyBatch
from bd3_scale.model.transformer import BlockDiffusionTransformer


def loss_sum(model: BlockDiffusionTransformer, batch: NoisyBatch) -> Tensor:
    """Σ over masked tokens of −log p_θ(x) / mask rate: the numerator of the training loss, a scalar in nats."""
    nll_M = model(batch.noisy_BL, batch.clean_BL, batch.positions_BL, batch.spans, batch.rows_M)
    return (nll_M * batch.weight_M).sum()
