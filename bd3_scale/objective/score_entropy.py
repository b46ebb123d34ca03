"""Train with score entropy, the loss of SEDD, in place of the cross-entropy (Lou et al., ICML 2024)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bd3_scale.objective.block_diffusion import BlockDiffusion
from bd3_scale.registry import objectives

if TYPE_CHECKING:
    from torch import Tensor


@objectives.register("score_entropy")
class ScoreEntropy(BlockDiffusion):
    """Block diffusion whose rows give scores that need not sum to 1; the loss is least at the true probabilities."""

    @property
    def is_exact(self) -> bool:
        return False

    def row_loss(self, nll_M: Tensor, log_total_M: Tensor) -> Tensor:
        """Return Σ_v u_v − 1 − log u_target for scores u (Lou et al., 2024, definition 3.1, absorbing noise).

        The score of a token is exp(logit) / n, where n is the number of clean tokens. An untrained model has logits
        near 0, so its scores begin near the uniform probabilities 1 / n. With the weights of block diffusion the loss
        bounds the negative log-likelihood, as the cross-entropy does.
        """
        # nll = log_total − logit. With s = log_total − log n: −log u_target = nll − s and Σ u = exp(s).
        log_sum = log_total_M - math.log(self.vocabulary.size - 1)
        return nll_M + (log_sum.expm1() - log_sum)

    evaluation_loss = row_loss
