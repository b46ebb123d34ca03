"""Score entropy: SEDD's loss in place of the cross-entropy (Lou et al., ICML 2024)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bd3_scale.objective.block_diffusion import BlockDiffusion
from bd3_scale.registry import objectives

if TYPE_CHECKING:
    from torch import Tensor


@objectives.register("score_entropy")
class ScoreEntropy(BlockDiffusion):
    """Block diffusion whose rows give scores that need not sum to 1, and are least at the probabilities."""

    @property
    def is_exact(self) -> bool:
        return False

    def row_loss(self, nll_M: Tensor, log_total_M: Tensor) -> Tensor:
        """Return Σ u − 1 − log u of the target, for scores u (Lou et al., 2024, definition 3.1, absorbing noise).

        A score is the exponential of its logit over the number of clean tokens, so that all are about 1 / that at
        first. With the weights of block diffusion it bounds the negative log-likelihood, as the cross-entropy does.
        """
        log_sum = log_total_M - math.log(self.vocabulary.size - 1)
        return nll_M + (log_sum.expm1() - log_sum)

    evaluation_loss = row_loss
