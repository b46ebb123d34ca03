"""Which masked tokens of a block a denoising pass unmasks.

First hitting takes one, at a place drawn uniformly: the reverse process of masked diffusion simulated exactly (Zheng et
al., ICLR 2025). Static and dynamic confidence take those whose drawn token is most probable, as SDAR decodes (Cheng et
al., 2025): static a fixed number a pass, dynamic all above a threshold and no fewer than that number.

Shapes: L' tokens a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Rule = Literal["first-hitting", "static", "dynamic"]
DEFAULT_THRESHOLD = 0.9


@dataclass(frozen=True)
class Unmasking:
    """How a block is unmasked.

    Attributes:
        counts: how many tokens each pass takes, by dynamic confidence at least; their sum is the block size.
        threshold: of dynamic confidence; None for the others.
    """

    rule: Rule
    counts: tuple[int, ...]
    threshold: float | None

    @classmethod
    def make(cls, rule: Rule, block_size: int, steps: int | None, threshold: float | None) -> Unmasking:
        """Defaults: as many passes as the block has tokens, and a threshold of 0.9.

        Raises:
            ValueError: an unknown rule, or an option that it does not take or that is out of its range.
        """
        if rule not in get_args(Rule):
            raise ValueError(f"unmasking={rule!r} is not known: take {', '.join(get_args(Rule))}")
        if rule == "first-hitting" and steps is not None:
            raise ValueError(
                f"steps={steps} belongs to static and dynamic unmasking, first-hitting takes a token a pass: "
                "choose one of them or leave steps out"
            )
        if rule != "dynamic" and threshold is not None:
            raise ValueError(
                f"threshold={threshold} belongs to dynamic unmasking, not to {rule}: choose that or leave threshold out"
            )
        steps = block_size if steps is None else steps
        if not 1 <= steps <= block_size:
            raise ValueError(f"steps is {steps}: give 1 to {block_size}, the tokens of a block")
        if rule == "dynamic":
            threshold = DEFAULT_THRESHOLD if threshold is None else threshold
            if not 0 < threshold <= 1:
                raise ValueError(f"threshold is {threshold}: give a probability above 0, up to 1")
        few, more = divmod(block_size, steps)
        return cls(rule, tuple(few + (step < more) for step in range(steps)), threshold)

    def choose(self, confidence: Tensor, masked: Tensor, step: int) -> Tensor:
        """bool [..., L']: what pass `step`, counted from 0, unmasks of the `masked` places (bool [..., L']).

        confidence: [..., L'], probability of the token that was drawn at each place. Equal ones go to the earlier
        place. Where fewer places are masked than the pass may take, it takes those.
        """
        order = confidence.masked_fill(~masked, -1.0).sort(dim=-1, descending=True, stable=True).indices
        best = masked & (order.argsort(dim=-1) < self.counts[step])
        if self.threshold is None:
            return best
        sure = masked & (confidence > self.threshold)
        return torch.where(sure.sum(-1, keepdim=True) >= self.counts[step], sure, best)
