"""Map the noise level t in [0, 1] to the mask rate p(t) = 1 − α(t), and to the weight of a masked token.

| name          | p(t)             | p'(t) = −α'(t)      | weight p'/p as a function of p |
|---------------|------------------|---------------------|--------------------------------|
| `linear`      | t                | 1                   | 1 / p                          |
| `cosine`      | 1 − cos(π t / 2) | π/2 · sin(π t / 2)  | π/2 · √((2 − p) / p)           |
| `square`      | t²               | 2 t                 | 2 / √p                         |
| `square_root` | √t               | 1 / (2 √t)          | 1 / (2 p²)                     |
| `log`         | log₂(1 + t)      | 1 / (ln 2 · (1 + t))| 1 / (ln 2 · 2^p · p)           |

The weight is −α'/(1 − α) = p'/p, the factor of the NELBO (MDLM: Sahoo et al., NeurIPS 2024; BD3-LM: Arriola et al.,
ICLR 2025, equation 8). All schedules begin at p(0) = 0 and end at p(1) = 1. The NELBO of a model is therefore the same
under each: substitution turns the integral of p'/p · f(p) over t into the integral of f(p)/p over p. Schedules differ
in the variance of the estimate alone. The expected square of a token's weighted mask is the integral of p'²/p over t.
It is 4 for `square` and π²/4 + π/2 = 4.04 for `cosine`, and infinite for the others, because of t near 0 (BD3-LM,
section 5 and table 8).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from bd3_scale.registry import schedules

WeightPolicy = Literal["nelbo", "unit_when_heavy"]

_Array = NDArray[np.float64]


class Curve:
    """A noise schedule: p(t) that grows from p(0) = 0 to p(1) = 1; registered with `@schedules.register("name")`.

    clips: whether an interval [β, ω] of mask rates may narrow it to β + (ω − β) p(t).
    is_mirrored: whether p(1 − t) = 1 − p(t).
    """

    clips = False
    is_mirrored = False

    def rate(self, level: _Array) -> _Array:
        """Return the mask rate p of noise levels t in [0, 1]."""
        raise NotImplementedError

    def slope(self, level: _Array) -> _Array:
        """Return the derivative p'(t) at noise levels t."""
        raise NotImplementedError

    def level(self, rate: _Array) -> _Array:
        """Return the noise level t of mask rates p: the inverse of `rate`."""
        raise NotImplementedError

    def problem(self) -> str | None:
        """Return a contradiction between the three functions, which would make losses silently wrong, or None."""
        level, step = np.arange(1, 64) / 64, 1e-6
        ends = self.rate(np.array([0.0, 1.0]))
        if not np.allclose(ends, [0, 1]):
            return f"its `rate` goes from {ends[0]:g} to {ends[1]:g}, and must go from 0 to 1"
        if not np.allclose(self.level(self.rate(level)), level):
            return "its `level` is not the inverse of its `rate`"
        slope = (self.rate(level + step) - self.rate(level - step)) / (2 * step)
        return None if np.allclose(self.slope(level), slope) else "its `slope` is not the derivative of its `rate`"


@schedules.register("linear")
class Linear(Curve):
    clips = True
    is_mirrored = True

    def rate(self, level: _Array) -> _Array:
        return level

    def slope(self, level: _Array) -> _Array:
        return np.ones_like(level)

    def level(self, rate: _Array) -> _Array:
        return rate


@schedules.register("cosine")
class Cosine(Curve):
    def rate(self, level: _Array) -> _Array:
        # 1 − cos x = 2 sin²(x/2). The left side loses all its digits near x = 0, where 1/p is large.
        return 2 * np.sin(level * math.pi / 4) ** 2

    def slope(self, level: _Array) -> _Array:
        return math.pi / 2 * np.sin(level * math.pi / 2)

    def level(self, rate: _Array) -> _Array:
        return 4 / math.pi * np.arcsin(np.sqrt(rate / 2))


@schedules.register("square")
class Square(Curve):
    def rate(self, level: _Array) -> _Array:
        return np.square(level)

    def slope(self, level: _Array) -> _Array:
        return 2 * level

    def level(self, rate: _Array) -> _Array:
        return np.sqrt(rate)


@schedules.register("square_root")
class SquareRoot(Curve):
    def rate(self, level: _Array) -> _Array:
        return np.sqrt(level)

    def slope(self, level: _Array) -> _Array:
        return 0.5 / np.sqrt(level)

    def level(self, rate: _Array) -> _Array:
        return np.square(rate)


@schedules.register("log")
class Log(Curve):
    def rate(self, level: _Array) -> _Array:
        return np.log1p(level) / math.log(2)

    def slope(self, level: _Array) -> _Array:
        return 1 / (math.log(2) * (1 + level))

    def level(self, rate: _Array) -> _Array:
        return np.expm1(rate * math.log(2))


@dataclass(frozen=True)
class Schedule:
    """A noise schedule with its clipped interval and the weights of the loss.

    Attributes:
        name: of a curve in the registry `schedules`.
        low, high: the clipped interval [β, ω] of mask rates. A curve with `clips`, such as `linear`, is mapped onto it
            affinely. A clipped loss is the part of the NELBO's integral over p in [β, ω], divided by ω − β, and is no
            bound; the weight of `linear` stays 1/p.
        num_steps: T of the absorbing D3PM (Austin et al., NeurIPS 2021). The level t takes the values 1/T … 1, and a
            masked token weighs T (p(t) − p(t − 1/T)) / p(t). The NELBO falls to that of continuous time as T grows.
            None: continuous time.
        weights: `nelbo`: the weights above. `unit_when_heavy`: 1 for every masked token where β > 0.5, as the official
            BD3-LM code trains. There 1/p is between 1 and 2; with unit weights a block counts by its number of masks.
        clip_masked_share: draw the number of masks of a block from the binomial distribution truncated to shares
            inside [β, ω], then the masked tokens. A block too short for any such number keeps its untruncated draw.
            The weight still uses the rate, so the mean share of masks is no longer exactly the rate.

    ValueError: an unknown name, an interval outside 0 <= low <= high <= 1 or with high = 0, which never masks, a
    clipped interval where the curve does not allow one or with finite T, or T < 1.
    """

    name: str = "linear"
    low: float = 0.0
    high: float = 1.0
    num_steps: int | None = None
    weights: WeightPolicy = "nelbo"
    clip_masked_share: bool = False

    def __post_init__(self) -> None:
        clips = self._curve.clips
        if self.weights not in get_args(WeightPolicy):
            raise ValueError(
                f"no weight policy is called {self.weights!r}: take one of {', '.join(get_args(WeightPolicy))}"
            )
        if not 0.0 <= self.low <= self.high <= 1.0 or self.high == 0.0:
            raise ValueError(f"mask rates [{self.low}, {self.high}]: 0 <= low <= high <= 1 and high > 0 are needed")
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"T is {self.num_steps}: give at least 1 step, or leave it out for continuous time")
        clipped = (self.low, self.high) != (0.0, 1.0)
        if clipped and not (clips and self.num_steps is None):
            kind = self.name if self.num_steps is None else f"finite-T {self.name}"
            raise ValueError(
                f"mask rates [{self.low}, {self.high}] need a schedule that can be clipped, such as linear, in "
                f"continuous time, and this one is {kind}: set the interval to 0 and 1, or take the linear schedule"
            )

    @property
    def is_mirrored(self) -> bool:
        """Say whether 1 − p has the distribution of p."""
        return self._curve.is_mirrored and self.num_steps is None and self.low + self.high == 1.0

    @property
    def _curve(self) -> Curve:
        curve: Curve = schedules.get(self.name)()
        return curve

    def mask_rate(self, noise_level: NDArray[np.float64]) -> NDArray[np.float32]:
        """Return p(t) for levels in [0, 1), in float32: masks are drawn with this number and the loss divides by it."""
        level = noise_level
        if self.num_steps is not None:
            level = (np.floor(level * self.num_steps) + 1) / self.num_steps
        rate = self.low + (self.high - self.low) * self._curve.rate(level)
        return np.clip(rate, self.low, self.high).astype(np.float32)

    def weight(self, mask_rate: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the factor of a token's nll where it is masked at this rate; finite where the rate is above 0."""
        if self.weights == "unit_when_heavy" and self.low > 0.5:
            return np.ones_like(mask_rate)
        rate, width = mask_rate.astype(np.float64), self.high - self.low
        curve = self._curve
        # At rate 0 the weight is inf or nan, which is never used: nothing is masked there.
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.num_steps is not None:
                # level · T is an integer, up to the rounding of the rate to float32; `round` removes that rounding.
                before = curve.rate((np.round(curve.level(rate) * self.num_steps) - 1) / self.num_steps)
                weight: NDArray[Any] = self.num_steps * (rate - before) / rate
            elif width:
                # A float32 rate may lie outside of the interval by its rounding.
                share = rate if width == 1 else np.clip((rate - self.low) / width, 0, 1)
                weight = curve.slope(curve.level(share)) / rate
            else:
                # β = ω: the interval has no width to divide by, and every curve gives the same single rate.
                weight = 1 / rate
        return weight.astype(np.float32)

    def admits(self, block_length: NDArray[np.int64], masks: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Say whether so many masks of a block's tokens are a share inside [low, high], up to rounding."""
        slack = 1e-9
        inside = (masks >= self.low * block_length - slack) & (masks <= self.high * block_length + slack)
        return inside & (masks <= block_length)


LINEAR = Schedule()
