"""Which masked tokens of a block a denoising pass unmasks.

| rule            | what a pass unmasks                                                                              |
|-----------------|--------------------------------------------------------------------------------------------------|
| `first-hitting` | one token, at a place drawn uniformly: the reverse process without its idle steps (Zheng et al., |
|                 | ICLR 2025)                                                                                       |
| `ancestral`     | each token by chance, so that T steps walk the mask rate from 1 to 0 (Sahoo et al., NeurIPS 2024)|
| `static`        | a fixed number, those of the most confident drawn tokens (SDAR, Cheng et al., 2025)              |
| `dynamic`       | all of a confidence above a threshold, and no fewer than that number                             |
| `entropy`       | the surest, as long as the entropies of all but the last add up to no more than a bound          |
|                 | (Ben-Hamu et al., 2025, EB-Sampler)                                                              |

The first two choose places before they see the model's logits, the others after: what confidence and entropy are is in
`bd3_scale.generate.draw`.

Shapes: L' tokens a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Rule = Literal["first-hitting", "ancestral", "static", "dynamic", "entropy"]
DEFAULT_THRESHOLDS = {"dynamic": 0.9, "entropy": 0.1}
_TAKES_STEPS = ("ancestral", "static", "dynamic")


@dataclass(frozen=True)
class Unmasking:
    """How a block is unmasked.

    Attributes:
        counts: how many tokens each pass takes, by dynamic confidence at least; their sum is the block size. Ancestral
            steps are as many.
        threshold: a probability for dynamic confidence, nats for the entropy bound; None for the others.
    """

    rule: Rule
    counts: tuple[int, ...]
    threshold: float | None

    @classmethod
    def make(cls, rule: Rule, block_size: int, steps: int | None, threshold: float | None) -> Unmasking:
        """Defaults: as many passes as the block has tokens, and a threshold of 0.9, or of 0.1 nats.

        Raises:
            ValueError: an unknown rule, or an option that it does not take or that is out of its range.
        """
        if rule not in get_args(Rule):
            raise ValueError(f"unmasking={rule!r} is not known: take {', '.join(get_args(Rule))}")
        if rule not in _TAKES_STEPS and steps is not None:
            raise ValueError(
                f"steps={steps} belongs to {', '.join(_TAKES_STEPS)} unmasking, and {rule} decides itself: choose one "
                "of them or leave steps out"
            )
        if rule not in DEFAULT_THRESHOLDS and threshold is not None:
            raise ValueError(
                f"threshold={threshold} belongs to {' and '.join(DEFAULT_THRESHOLDS)} unmasking, not to {rule}: choose "
                "one of them or leave threshold out"
            )
        steps = block_size if steps is None else steps
        if steps < 1 or (steps > block_size and rule != "ancestral"):
            raise ValueError(f"steps is {steps}: give 1 to {block_size}, the tokens of a block")
        if rule in DEFAULT_THRESHOLDS:
            threshold = DEFAULT_THRESHOLDS[rule] if threshold is None else threshold
            if rule == "dynamic" and not 0 < threshold <= 1:
                raise ValueError(f"threshold is {threshold}: give a probability above 0, up to 1")
            if threshold < 0:
                raise ValueError(f"threshold is {threshold}: give nats, 0 or more")
        few, more = divmod(block_size, steps)
        return cls(rule, tuple(few + (step < more) for step in range(steps)), threshold)

    @property
    def sees_logits(self) -> bool:
        """Whether places are chosen by what the model says of them."""
        return self.rule not in ("first-hitting", "ancestral")

    def choose_blindly(
        self, masked: NDArray[np.bool_], order: NDArray[np.float64], chance: NDArray[np.float64], step: int
    ) -> NDArray[np.bool_]:
        """bool [L']: what step `step`, counted from 0, unmasks of one block's `masked` places; perhaps none.

        order: float64 [L'] uniforms of the block; chance: of the step.
        """
        if self.rule == "first-hitting":
            return masked & (order == order[masked].min())
        # From the rate 1 - step / T to 1 - (step + 1) / T; the last step takes all that are left.
        return masked & (chance * (len(self.counts) - step) < 1)

    def choose(self, confidence: Tensor, entropy: Tensor, masked: Tensor, steps: Tensor) -> Tensor:
        """bool [B, L']: what each block's pass, `steps` [B] counted from 0, unmasks of its `masked` places [B, L'].

        confidence: [B, L'], of the token that was drawn at each place; entropy: [B, L'], nats of the distribution there
        (see `bd3_scale.generate.draw`). Equal ones go to the earlier place. Where fewer places are masked than the pass
        may take, it takes those.
        """
        if self.rule == "entropy":
            assert self.threshold is not None
            sorted_entropy, order = entropy.masked_fill(~masked, float("inf")).sort(dim=-1, stable=True)
            # The last of those taken is their largest, and does not count.
            before = torch.cat([torch.zeros_like(sorted_entropy[:, :1]), sorted_entropy[:, :-1].cumsum(-1)], -1)
            return masked & (before <= self.threshold).gather(-1, order.argsort(dim=-1))
        counts = torch.tensor(self.counts, device=steps.device)[steps][:, None]
        order = confidence.masked_fill(~masked, -1.0).sort(dim=-1, descending=True, stable=True).indices
        best = masked & (order.argsort(dim=-1) < counts)
        if self.threshold is None:
            return best
        sure = masked & (confidence > self.threshold)
        return torch.where(sure.sum(-1, keepdim=True) >= counts, sure, best)
