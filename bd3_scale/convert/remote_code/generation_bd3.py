"""Drawing the tokens of a block, and choosing which of them stay.

Both are the native sampler's (generate/draw.py has the law, generate/unmasking.py the rules "static" and "dynamic"), so
that a checkpoint writes alike there and here: tokens are drawn from softmax(logits / T) after top-k and top-p; their
confidence is their probability before these. Everything is computed in float64, but on devices that have none (mps),
where it is float32.

Legend: B sequences, S new tokens, K tokens a block, V vocabulary entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Unmasking:
    """How tokens are drawn, and which of them stay; see `Bd3ForCausalLM.generate`."""

    block_size: int
    steps: int
    kind: str
    threshold: float
    temperature: float
    top_k: int | None
    top_p: float | None

    def __post_init__(self) -> None:
        for right, problem in (
            (self.block_size >= 1, f"block_size={self.block_size} must be at least 1"),
            (1 <= self.steps <= self.block_size, f"steps={self.steps} must be 1 to block_size={self.block_size}"),
            (self.kind in ("dynamic", "static"), f"unmasking={self.kind!r} must be 'dynamic' or 'static'"),
            (0 <= self.threshold <= 1, f"threshold={self.threshold} must be a probability"),
            (self.temperature >= 0, f"temperature={self.temperature} must be 0 (most likely token) or above"),
            (self.top_k is None or self.top_k >= 1, f"top_k={self.top_k} must be None or at least 1"),
            (self.top_p is None or 0 < self.top_p <= 1, f"top_p={self.top_p} must be None or in (0, 1]"),
        ):
            if not right:
                raise ValueError(problem)

    def draw(self, logits_BKV: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """A token for every place, and its confidence: [B, K] each. Of equal candidates the smallest id ranks first."""
        wide = torch.float32 if logits_BKV.device.type == "mps" else torch.float64
        shares = (logits_BKV.to(wide) / (self.temperature or 1.0)).softmax(dim=-1)
        if self.temperature == 0:
            drawn = logits_BKV.argmax(dim=-1, keepdim=True)
        else:
            ranked, ids = truncate(shares, self.top_k, self.top_p)
            rank = torch.multinomial(ranked.flatten(0, -2), 1, generator=generator)
            drawn = ids.gather(-1, rank.reshape(*ranked.shape[:-1], 1))
        return drawn[..., 0], shares.gather(-1, drawn)[..., 0]

    def choose(self, confidence_BK: Tensor, masked_BK: Tensor, step: int) -> Tensor:
        """Which masked places a pass settles: [B, K]. Of equal confidences the first places win."""
        count = self.block_size // self.steps + (step < self.block_size % self.steps)
        confidence_BK = confidence_BK.masked_fill(~masked_BK, -1)
        rank_BK = confidence_BK.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        best_BK = masked_BK & (rank_BK < count)
        if self.kind == "static":
            return best_BK
        sure_BK = masked_BK & (confidence_BK > self.threshold)
        return torch.where(sure_BK.sum(dim=1, keepdim=True) >= count, sure_BK, best_BK)


def truncate(shares: Tensor, top_k: int | None, top_p: float | None) -> tuple[Tensor, Tensor]:
    """Probabilities [..., V] from the largest on, normalised, with zeros where `top_k` and then `top_p` forbid; and
    the ids that they are of.
    """
    ranked, ids = shares.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ranked[..., top_k:] = 0
        ranked = ranked / ranked.sum(dim=-1, keepdim=True)
    if top_p is not None and top_p < 1:
        # The mass before a token: the one that crosses top_p stays.
        ranked[ranked.cumsum(dim=-1) - ranked >= top_p] = 0
        ranked = ranked / ranked.sum(dim=-1, keepdim=True)
    return ranked, ids


def padded_after_stop(tokens: Tensor, prompt: int, stops: Tensor, pad: int) -> Tensor:
    """Sequences [B, prompt + S], each padded after its first stop token of those S; as long as the longest needs."""
    new = tokens[:, prompt:]
    is_stop = torch.isin(new, stops).int()
    after = is_stop.cumsum(dim=1) > is_stop
    longest = int((~after).sum(dim=1).max())
    return torch.cat([tokens[:, :prompt], new.masked_fill(after, pad)[:, :longest]], dim=1)
