"""Tokens from logits, and how sure the model is of them: one law, here and in exports.

1. The model's distribution is softmax(logits / T), in float64; at temperature 0 it is that of T = 1.
2. Confidence of a token is its probability under that distribution, and entropy is that distribution's, in nats.
   Neither knows of top-k or top-p, as in SDAR's evaluation code (Cheng et al., 2025): where these leave one token, the
   model is no surer of it.
3. Tokens are drawn from what top-k and then top-p leave of it, each followed by normalisation. They are ranked by
   probability, equal ones by id, the smallest first. Top-k keeps the first k; top-p below 1 (the nucleus, Holtzman et
   al., ICLR 2020) those before which the mass is less than top_p, so that the one that crosses it stays.
4. At temperature 0 the first in rank is taken, whatever top-k and top-p are.

`bd3_scale/convert/remote_code/generation_bd3.py` does the same without this package; only the random numbers differ:
here by inverse transform from given uniforms.

Shapes: M rows, V vocabulary entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn.

    temperature: of the softmax; at 0 the most likely token is taken. top_k: only the k most likely tokens. top_p: the
    nucleus, the fewest tokens whose probabilities add up to top_p or more; after top_k, where both are given. What is
    right for them, `SamplingConfig` checks.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def distribution(self, logits_MV: Tensor) -> Tensor:
        """Probabilities float64 [M, V] that tokens are drawn from; at temperature 0 those of temperature 1."""
        return self._truncated(self._shares(logits_MV))

    def draw(self, logits_MV: Tensor, uniforms_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [M], their confidence [M], and the entropy in nats [M] of the model's distributions."""
        shares = self._shares(logits_MV)
        tokens = self._drawn(logits_MV, shares, uniforms_M)
        return tokens[:, 0], shares.gather(-1, tokens)[:, 0], torch.special.entr(shares).sum(-1)

    def tokens(self, logits_MV: Tensor, uniforms_M: Tensor) -> Tensor:
        """Return the tokens of `draw` alone, [M]."""
        return self._drawn(logits_MV, self._shares(logits_MV), uniforms_M)[:, 0]

    def _drawn(self, logits_MV: Tensor, shares_MV: Tensor, uniforms_M: Tensor) -> Tensor:
        """Return [M, 1]."""
        if self.temperature == 0:
            return logits_MV.argmax(-1, keepdim=True)
        cumulative = self._truncated(shares_MV).cumsum(-1)
        # Where forbidden ids end the vocabulary their cumulative sum repeats the last allowed one's, which the search
        # never passes.
        target = uniforms_M.to(cumulative.device).unsqueeze(-1) * cumulative[:, -1:]
        return torch.searchsorted(cumulative, target, right=True)

    def _shares(self, logits_MV: Tensor) -> Tensor:
        """Return the model's distribution, float64 [M, V], before top-k and top-p."""
        logits_MV = logits_MV.double()
        return (logits_MV if self.temperature in (0, 1) else logits_MV / self.temperature).softmax(-1)

    def _truncated(self, shares_MV: Tensor) -> Tensor:
        """Return what top-k and then top-p leave of distributions."""
        if self.top_k is None and self.top_p == 1.0:
            return shares_MV
        ranked, ids = shares_MV.sort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            ranked[:, self.top_k :] = 0
            ranked /= ranked.sum(-1, keepdim=True)
        if self.top_p < 1:
            ranked[ranked.cumsum(-1) - ranked >= self.top_p] = 0
            ranked /= ranked.sum(-1, keepdim=True)
        return torch.zeros_like(shares_MV).scatter_(-1, ids, ranked)
