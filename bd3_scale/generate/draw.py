"""Draw tokens from logits, and measure the model's confidence; the same definitions hold in exports.

1. The model's distribution is softmax(logits / T), in float64; at temperature 0 it is that of T = 1.
2. Confidence of a token is its probability under that distribution; entropy is that distribution's, in nats. Neither is
   changed by top-k or top-p, as in SDAR's evaluation code (Cheng et al., 2025): if these leave one token, the model is
   no more certain of it.
3. Tokens are drawn from what top-k and then top-p leave of the distribution, each followed by normalisation. Tokens are
   ranked by probability, equal ones by id, the smallest first. Top-k keeps the first k. Top-p below 1 (the nucleus,
   Holtzman et al., ICLR 2020) keeps the tokens before which the mass is less than top_p, including the one that crosses
   it.
4. At temperature 0 the first in rank is taken, whatever top-k and top-p are.

`bd3_scale/convert/remote_code/generation_bd3.py` does the same without this package. Only the random numbers differ:
here tokens are drawn by inverse transform from given uniforms.

Float64, since the cumulative sum over a vocabulary of 150,000 entries loses the small probabilities in float32.

Shapes: M rows, V vocabulary entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Drawing:
    """Options of drawing tokens; `SamplingConfig` checks their values.

    temperature: of the softmax; at 0 the most likely token is taken. top_k: only the k most likely tokens. top_p: only
    the nucleus, the fewest tokens whose probabilities add up to top_p or more; applied after top_k.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def distribution(self, logits_MV: Tensor) -> Tensor:
        """Return the probabilities float64 [M, V] that tokens are drawn from; at temperature 0 those of temperature
        1."""
        return self._truncated(self._probabilities(logits_MV))

    def draw(self, logits_MV: Tensor, uniforms_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens [M], their confidence [M], and the entropy in nats [M] of the model's distributions."""
        probabilities = self._probabilities(logits_MV)
        tokens = self._drawn(logits_MV, probabilities, uniforms_M)
        return tokens[:, 0], probabilities.gather(-1, tokens)[:, 0], torch.special.entr(probabilities).sum(-1)

    def tokens(self, logits_MV: Tensor, uniforms_M: Tensor) -> Tensor:
        """Return the tokens of `draw` alone, [M]."""
        return self._drawn(logits_MV, self._probabilities(logits_MV), uniforms_M)[:, 0]

    def _drawn(self, logits_MV: Tensor, probabilities_MV: Tensor, uniforms_M: Tensor) -> Tensor:
        """Return the drawn tokens [M, 1]."""
        if self.temperature == 0:
            return logits_MV.argmax(-1, keepdim=True)
        cumulative = self._truncated(probabilities_MV).cumsum(-1)
        # Inverse transform: the first id whose cumulative sum exceeds u times the total. Ids of probability 0 repeat
        # the sum before them and are never found; the total in place of 1 keeps rounding from running past the last id.
        target = uniforms_M.to(cumulative.device).unsqueeze(-1) * cumulative[:, -1:]
        return torch.searchsorted(cumulative, target, right=True)

    def _probabilities(self, logits_MV: Tensor) -> Tensor:
        """Return the model's distribution, float64 [M, V], before top-k and top-p."""
        logits_MV = logits_MV.double()
        return (logits_MV if self.temperature in (0, 1) else logits_MV / self.temperature).softmax(-1)

    def _truncated(self, probabilities_MV: Tensor) -> Tensor:
        """Return the distributions after top-k and then top-p, normalised."""
        if self.top_k is None and self.top_p == 1.0:
            return probabilities_MV
        ranked, ids = probabilities_MV.sort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            ranked[:, self.top_k :] = 0
            ranked /= ranked.sum(-1, keepdim=True)
        if self.top_p < 1:
            ranked[ranked.cumsum(-1) - ranked >= self.top_p] = 0
            ranked /= ranked.sum(-1, keepdim=True)
        return torch.zeros_like(probabilities_MV).scatter_(-1, ids, ranked)
