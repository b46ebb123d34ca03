"""Choose which masked tokens of a block a denoising pass unmasks: the rules, to which a plug-in may add.

| rule            | what a pass unmasks                                                                              |
|-----------------|--------------------------------------------------------------------------------------------------|
| `first-hitting` | one token, at a position drawn uniformly: the reverse process without its idle steps (Zheng et   |
|                 | al., ICLR 2025)                                                                                  |
| `ancestral`     | each token by chance, so that T steps reduce the mask rate from 1 to 0 (Sahoo et al., NeurIPS    |
|                 | 2024)                                                                                            |
| `static`        | a fixed number: the most confident drawn tokens (SDAR, Cheng et al., 2025)                       |
| `dynamic`       | all tokens of a confidence above a threshold, but no fewer than that number                      |
| `entropy`       | the most certain, as long as the entropies of all but the last add up to no more than a bound    |
|                 | (Ben-Hamu et al., 2025, EB-Sampler)                                                              |

The first two choose positions before they see the model's logits, so a pass computes logits for these alone; the others
choose after. `bd3_scale.generate.draw` defines confidence and entropy. This file loads without PyTorch, so that the
command line can check a rule's options at once.

Shapes: B texts, L' tokens per block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from bd3_scale.registry import unmasking_rules

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True)
class Threshold:
    """The threshold option of a rule. default: if none is given; allows: whether a value is valid; range: for
    people."""

    default: float
    allows: Callable[[float], bool]
    range: str


class Rule:
    """A rule for blocks of one size; its base class is `BlindRule` or `SightedRule`.

    takes_steps: whether the number of passes per block is an option; takes_threshold: the threshold option, if any.
    steps: default: the tokens of a block; threshold: default: that of `takes_threshold`, or 0.
    """

    takes_steps: ClassVar[bool] = False
    takes_threshold: ClassVar[Threshold | None] = None

    def __init__(self, block_size: int, steps: int | None = None, threshold: float | None = None) -> None:
        default = 0.0 if self.takes_threshold is None else self.takes_threshold.default
        self.block_size = block_size
        self.steps = block_size if steps is None else steps
        self.threshold = default if threshold is None else threshold


class BlindRule(Rule, ABC):
    """Chooses positions before the forward, which then predicts these alone."""

    @abstractmethod
    def choose(
        self, masked: NDArray[np.bool_], order: NDArray[np.float64], chance: NDArray[np.float64], step: int
    ) -> NDArray[np.bool_]:
        """Return the `masked` positions of one block that step `step`, counted from 0, unmasks, bool [L'].

        If there are none, the next step follows without a forward; some step must choose one.

        order: float64 [L'] uniforms of the block; chance: float64 [L'] uniforms of the step.
        """


class SightedRule(Rule, ABC):
    """Chooses positions after the forward, by the model's predictions."""

    @abstractmethod
    def choose(self, confidence: Tensor, entropy: Tensor, masked: Tensor, steps: Tensor) -> Tensor:
        """Return the `masked` positions that each block's pass unmasks, at least one, bool [B, L'].

        steps: [B], the number of each block's pass, counted from 0. confidence: [B, L'], of the token drawn at each
        position; entropy: [B, L'], of the distribution there, in nats (see `bd3_scale.generate.draw`).
        """


@unmasking_rules.register("first-hitting")
class FirstHitting(BlindRule):
    """One token at a position drawn uniformly."""

    def choose(
        self, masked: NDArray[np.bool_], order: NDArray[np.float64], chance: NDArray[np.float64], step: int
    ) -> NDArray[np.bool_]:
        """Return the first masked position in the block's order.

        The time of the next change in the reverse process does not matter for the text, only its position does, and all
        masked positions are equally likely (Zheng et al., ICLR 2025, first-hitting sampler).
        """
        return masked & (order == order[masked].min())


@unmasking_rules.register("ancestral")
class Ancestral(BlindRule):
    """Each token by chance."""

    takes_steps = True

    def choose(
        self, masked: NDArray[np.bool_], order: NDArray[np.float64], chance: NDArray[np.float64], step: int
    ) -> NDArray[np.bool_]:
        """Return each masked position with probability 1 / (T - step).

        That reduces the mask rate from 1 - step / T to 1 - (step + 1) / T: of the tokens that are still masked, the
        share (1 / T) / (1 - step / T). The last step takes all that are left.
        """
        return masked & (chance * (self.steps - step) < 1)


@unmasking_rules.register("static")
class Static(SightedRule):
    """A fixed number of the most confident tokens; ValueError: more passes than the block has tokens."""

    takes_steps = True

    def __init__(self, block_size: int, steps: int | None = None, threshold: float | None = None) -> None:
        super().__init__(block_size, steps, threshold)
        if self.steps > block_size:
            raise ValueError(f"steps is {steps}: give 1 to {block_size}, the tokens of a block")

    def choose(self, confidence: Tensor, entropy: Tensor, masked: Tensor, steps: Tensor) -> Tensor:
        """Return as many positions as the pass's share, or all that are left; of equal ones the first."""
        order = confidence.masked_fill(~masked, -1.0).argsort(dim=-1, descending=True, stable=True)
        return masked & (order.argsort(dim=-1) < self._counts(steps))

    def _counts(self, steps: Tensor) -> Tensor:
        """Return how many tokens each pass takes, [B, 1]: even shares of a block, the larger ones first."""
        few, more = divmod(self.block_size, self.steps)
        return few + (steps < more)[:, None].long()


@unmasking_rules.register("dynamic")
class Dynamic(Static):
    """All tokens of a confidence above a threshold, if these are no fewer than the static number."""

    takes_threshold = Threshold(0.9, lambda value: 0 < value <= 1, "a probability above 0, up to 1")

    def choose(self, confidence: Tensor, entropy: Tensor, masked: Tensor, steps: Tensor) -> Tensor:
        """Return the positions above the threshold, or the static choice if these are too few."""
        confident = masked & (confidence > self.threshold)
        enough = confident.sum(-1, keepdim=True) >= self._counts(steps)
        return confident.where(enough, super().choose(confidence, entropy, masked, steps))


@unmasking_rules.register("entropy")
class EntropyBound(SightedRule):
    """The most certain tokens, up to a sum of entropies."""

    takes_threshold = Threshold(0.1, lambda value: value >= 0, "nats, 0 or more")

    def choose(self, confidence: Tensor, entropy: Tensor, masked: Tensor, steps: Tensor) -> Tensor:
        """Return the positions, by rising entropy, before which the sum of entropies is within the bound.

        The bound limits the dependence between tokens drawn at once: the sum of entropies without the largest bounds
        their total correlation (Ben-Hamu et al., 2025).
        """
        sorted_entropy, order = entropy.masked_fill(~masked, float("inf")).sort(dim=-1, stable=True)
        # The sum before a position leaves out the position's own entropy, the largest so far.
        before = sorted_entropy.cumsum(-1).roll(1, -1)
        before[:, 0] = 0
        return masked & (before <= self.threshold).gather(-1, order.argsort(dim=-1))


def check_options(name: str, steps: int | None, threshold: float | None) -> None:
    """Check a rule's name and options, as far as they do not depend on the block size.

    ValueError: an unknown rule, or an option that it does not have or that is out of its range.
    """
    rule = unmasking_rules.get(name)
    known = {other: unmasking_rules.get(other) for other in unmasking_rules.names()}
    if steps is not None and not rule.takes_steps:
        takers = ", ".join(other for other, kind in known.items() if kind.takes_steps)
        raise ValueError(
            f"steps={steps} is an option of {takers} unmasking, not of {name}: choose one of them or leave out steps"
        )
    if steps is not None and steps < 1:
        raise ValueError(f"steps is {steps}: give 1 or more, up to the tokens of a block")
    if threshold is None:
        return
    if rule.takes_threshold is None:
        takers = " and ".join(other for other, kind in known.items() if kind.takes_threshold)
        raise ValueError(
            f"threshold={threshold} is an option of {takers} unmasking, not of {name}: choose one of them or leave out "
            "threshold"
        )
    if not rule.takes_threshold.allows(threshold):
        raise ValueError(f"threshold is {threshold}: give {rule.takes_threshold.range}")
