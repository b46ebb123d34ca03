"""Which masked tokens of a block a denoising pass unmasks: rules, which a person may add to.

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
`bd3_scale.generate.draw`. This file loads without PyTorch, so that a command line checks a rule's options at once.

Shapes: B texts, L' tokens a block.
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
    """An option of a rule. default: where none is given; allows: whether a value is right; what `range` says of it."""

    default: float
    allows: Callable[[float], bool]
    range: str


class Rule:
    """A rule for blocks of one size, of `BlindRule` or `SightedRule`.

    takes_steps: whether a person may say in how many passes a block is filled; takes_threshold: and a threshold.
    steps: as many as the block has tokens, where nothing is said; threshold: the default of `takes_threshold`, or 0.
    """

    takes_steps: ClassVar[bool] = False
    takes_threshold: ClassVar[Threshold | None] = None

    def __init__(self, block_size: int, steps: int | None = None, threshold: float | None = None) -> None:
        default = 0.0 if self.takes_threshold is None else self.takes_threshold.default
        self.block_size = block_size
        self.steps = block_size if steps is None else steps
        self.threshold = default if threshold is None else threshold


class BlindRule(Rule, ABC):
    """Chooses places before the model is asked, which then predicts these alone."""

    @abstractmethod
    def choose(
        self, masked: NDArray[np.bool_], order: NDArray[np.float64], chance: NDArray[np.float64], step: int
    ) -> NDArray[np.bool_]:
        """Return bool [L'], what step `step`, counted from 0, unmasks of one block's `masked` places.

        Where that is nothing, the next step is asked for at once; one of them takes something.

        order: float64 [L'] uniforms of the block; chance: of the step.
        """


class SightedRule(Rule, ABC):
    """Chooses places by what the model says of them."""

    @abstractmethod
    def choose(self, confidence: Tensor, entropy: Tensor, masked: Tensor, steps: Tensor) -> Tensor:
        """Return bool [B, L'], what each block's pass, `steps` [B] counted from 0, unmasks of its `masked` places.

        That is one at least. confidence: [B, L'], of the token that was drawn at each place; entropy: [B, L'], nats of
        the distribution there (see `bd3_scale.generate.draw`).
        """


@unmasking_rules.register("first-hitting")
class FirstHitting(BlindRule):
    """One token at a place drawn uniformly."""

    def choose(
        self, masked: NDArray[np.bool_], order: NDArray[np.float64], chance: NDArray[np.float64], step: int
    ) -> NDArray[np.bool_]:
        """Return the first place in the block's order."""
        return masked & (order == order[masked].min())


@unmasking_rules.register("ancestral")
class Ancestral(BlindRule):
    """Each token by chance."""

    takes_steps = True

    def choose(
        self, masked: NDArray[np.bool_], order: NDArray[np.float64], chance: NDArray[np.float64], step: int
    ) -> NDArray[np.bool_]:
        """Return what leaves the rate 1 - step / T for 1 - (step + 1) / T; the last step takes all that are left."""
        return masked & (chance * (self.steps - step) < 1)


@unmasking_rules.register("static")
class Static(SightedRule):
    """A fixed number of the most confident; ValueError: more passes than the block has tokens."""

    takes_steps = True

    def __init__(self, block_size: int, steps: int | None = None, threshold: float | None = None) -> None:
        super().__init__(block_size, steps, threshold)
        if self.steps > block_size:
            raise ValueError(f"steps is {steps}: give 1 to {block_size}, the tokens of a block")

    def choose(self, confidence: Tensor, entropy: Tensor, masked: Tensor, steps: Tensor) -> Tensor:
        """Return the places of the pass's share, or all that are left; equal ones from the left."""
        order = confidence.masked_fill(~masked, -1.0).argsort(dim=-1, descending=True, stable=True)
        return masked & (order.argsort(dim=-1) < self._counts(steps))

    def _counts(self, steps: Tensor) -> Tensor:
        """How many tokens each pass takes, [B, 1]: the passes share a block evenly, the larger first."""
        few, more = divmod(self.block_size, self.steps)
        return few + (steps < more)[:, None].long()


@unmasking_rules.register("dynamic")
class Dynamic(Static):
    """All of a confidence above a threshold, where these are no fewer than the static number."""

    takes_threshold = Threshold(0.9, lambda value: 0 < value <= 1, "a probability above 0, up to 1")

    def choose(self, confidence: Tensor, entropy: Tensor, masked: Tensor, steps: Tensor) -> Tensor:
        """Return the sure places, or else the static choice."""
        sure = masked & (confidence > self.threshold)
        enough = sure.sum(-1, keepdim=True) >= self._counts(steps)
        return sure.where(enough, super().choose(confidence, entropy, masked, steps))


@unmasking_rules.register("entropy")
class EntropyBound(SightedRule):
    """The surest, up to a sum of entropies."""

    takes_threshold = Threshold(0.1, lambda value: value >= 0, "nats, 0 or more")

    def choose(self, confidence: Tensor, entropy: Tensor, masked: Tensor, steps: Tensor) -> Tensor:
        """Return the places before which the sum is at the bound at the most; of equal ones the earlier."""
        sorted_entropy, order = entropy.masked_fill(~masked, float("inf")).sort(dim=-1, stable=True)
        # The last of those taken is their largest, and does not count.
        before = sorted_entropy.cumsum(-1).roll(1, -1)
        before[:, 0] = 0
        return masked & (before <= self.threshold).gather(-1, order.argsort(dim=-1))


def check_options(name: str, steps: int | None, threshold: float | None) -> None:
    """Check a rule's name and options, but for what its block size decides.

    ValueError: an unknown rule, or an option that it does not take or that is out of its range.
    """
    rule = unmasking_rules.get(name)
    known = {other: unmasking_rules.get(other) for other in unmasking_rules.names()}
    if steps is not None and not rule.takes_steps:
        takers = ", ".join(other for other, kind in known.items() if kind.takes_steps)
        raise ValueError(
            f"steps={steps} belongs to {takers} unmasking, and {name} decides itself: choose one of them or leave "
            "steps out"
        )
    if steps is not None and steps < 1:
        raise ValueError(f"steps is {steps}: give 1 or more, up to the tokens of a block")
    if threshold is None:
        return
    if rule.takes_threshold is None:
        takers = " and ".join(other for other, kind in known.items() if kind.takes_threshold)
        raise ValueError(
            f"threshold={threshold} belongs to {takers} unmasking, not to {name}: choose one of them or leave "
            "threshold out"
        )
    if not rule.takes_threshold.allows(threshold):
        raise ValueError(f"threshold is {threshold}: give {rule.takes_threshold.range}")
