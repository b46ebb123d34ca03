"""Estimate the uncertainty of a difference between rows: over sequences, which rows share, and over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"


@dataclass(frozen=True)
class Measured:
    """A row's results on a text: nats [seeds, sequences], and the counted tokens [sequences]."""

    nats: NDArray[np.float64]
    tokens: NDArray[np.float64]

    @classmethod
    def of(cls, records: Sequence[dict[str, Any]], text: str) -> Measured:
        """Collect the records of all seeds. KeyError: the text was not measured."""
        parts = [record["texts"][text] for record in records]
        return cls(np.array([part["nats"] for part in parts]), np.array(parts[0]["tokens"], dtype=float))

    @property
    def by_seed(self) -> NDArray[np.float64]:
        """Return the nats per token of each seed."""
        nats: NDArray[np.float64] = self.nats.sum(1) / self.tokens.sum()
        return nats

    @property
    def mean(self) -> float:
        """Return the mean nats per token over seeds."""
        return float(self.by_seed.mean())

    def text_error(self) -> float:
        """Return the standard error over sequences."""
        return _ratio_error(self.nats.mean(0), self.tokens)


@dataclass(frozen=True)
class Seeds:
    """The spread over seeds, pooled over rows: standard deviation in nats a token, and its degrees of freedom."""

    deviation: float
    freedom: int

    @classmethod
    def pooled(cls, rows: Sequence[Measured]) -> Seeds:
        """Pool the spread over the seeds of several rows."""
        squares = sum(float(((row.by_seed - row.mean) ** 2).sum()) for row in rows)
        freedom = sum(len(row.by_seed) - 1 for row in rows)
        return cls(math.sqrt(squares / freedom) if freedom else 0.0, freedom)

    def error(self, *counts: int) -> float:
        """Return the standard error of a difference of means over `counts` seeds each."""
        return self.deviation * math.sqrt(sum(1 / count for count in counts))

    @property
    def quantile(self) -> float:
        """Return the two-sided 95% quantile of Student's t; the normal one if one seed leaves the spread unknown."""
        return float(t.ppf(0.975, self.freedom) if self.freedom else norm.ppf(0.975))


@dataclass(frozen=True)
class Difference:
    """Difference of two rows in nats per token; margin: half of its 95% interval."""

    value: float
    margin: float

    @classmethod
    def between(cls, first: Measured, second: Measured, seeds: Seeds) -> Difference:
        """Compare two rows on the same sequences: what makes a sequence hard for both cancels out."""
        per_sequence = first.nats.mean(0) - second.nats.mean(0)
        error = math.hypot(_ratio_error(per_sequence, first.tokens), seeds.error(len(first.nats), len(second.nats)))
        return cls(first.mean - second.mean, seeds.quantile * error)

    def verdict(self, more: bool = True) -> str:
        """Return the verdict on the claim that the first costs more (or less)."""
        if abs(self.value) <= self.margin:
            return UNDECIDED
        return HOLDS if (self.value > 0) == more else FAILS

    def __str__(self) -> str:
        return f"{self.value:+.4f} ± {self.margin:.4f}"


def together(verdicts: Sequence[str]) -> str:
    """Return the verdict on a claim that consists of several."""
    if all(verdict == HOLDS for verdict in verdicts):
        return HOLDS
    return FAILS if FAILS in verdicts else UNDECIDED


def interval(measured: Measured, seeds: Seeds) -> float:
    """Return half of the 95% interval of a row's nats per token, over text and seeds."""
    return seeds.quantile * math.hypot(measured.text_error(), seeds.error(len(measured.nats)))


def fluctuation(losses: Sequence[float]) -> float:
    """Return the variance of a training loss from step to step, in the second half of a run, where it hardly falls.

    It is half the mean square of successive differences, which a slow trend does not affect.
    """
    half = np.asarray(losses[len(losses) // 2 :])
    return float(np.square(np.diff(half)).mean() / 2)


def _ratio_error(sums: NDArray[np.float64], tokens: NDArray[np.float64]) -> float:
    """Return the standard error of Σ sums / Σ tokens over sequences (Cochran, Sampling Techniques, chapter 6)."""
    count = len(sums)
    residual = sums - sums.sum() / tokens.sum() * tokens
    return math.sqrt(float(np.square(residual).sum()) * count / (count - 1)) / float(tokens.sum())
