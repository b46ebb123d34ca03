"""Tokens from logits: temperature, top-k and nucleus, by inverse transform in float64.

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
    nucleus, the fewest tokens whose probabilities add up to top_p or more (Holtzman et al., ICLR 2020), so that the one
    that crosses it belongs to them; after top_k, where both are given.

    ValueError: a value out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}: give 0 (most likely token) or above")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}: give at least 1, or leave it out")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: give a probability above 0, up to 1")

    def distribution(self, logits_MV: Tensor) -> Tensor:
        """Probabilities float64 [M, V] that tokens are drawn from; at temperature 0 those of temperature 1."""
        probabilities = (logits_MV.double() / (self.temperature or 1.0)).softmax(-1)
        if self.top_k is None and self.top_p == 1.0:
            return probabilities
        ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            ordered[:, self.top_k :] = 0
            ordered /= ordered.sum(-1, keepdim=True)
        ordered[ordered.cumsum(-1) - ordered >= self.top_p] = 0
        kept = torch.zeros_like(probabilities).scatter_(-1, ids, ordered)
        return kept / kept.sum(-1, keepdim=True)

    def draw(self, logits_MV: Tensor, uniforms_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [M], their probabilities [M], and the entropy in nats [M] of the distributions they are from."""
        probabilities = self.distribution(logits_MV)
        if self.temperature == 0:
            tokens = logits_MV.argmax(-1, keepdim=True)
        else:
            cumulative = probabilities.cumsum(-1)
            # Where forbidden ids end the vocabulary their cumulative sum repeats the last allowed one's, which the
            # search never passes.
            target = uniforms_M.to(cumulative.device)[:, None] * cumulative[:, -1:]
            tokens = torch.searchsorted(cumulative, target, right=True)
        entropy = torch.special.entr(probabilities).sum(-1)
        return tokens[:, 0], probabilities.gather(-1, tokens)[:, 0], entropy
