"""Which clipped interval of mask rates leaves the training loss the least variance.

A block masked at rate p with negative log-likelihood S has the loss X = S / p a token of it. Evaluation draws p from
the whole of [0, 1]; those blocks whose rate falls inside an interval are draws of its own. One pass thus serves every
interval, all on the same text, levels and masks, and costs nothing that evaluation does not (the paper evaluates
each interval anew: Arriola et al., ICLR 2025, section 5.2).

The variance is the mean of X² minus the mean of X X' over pairs of blocks of different sequences: unbiased, though
blocks of one sequence share their text and stratify their levels. It needs three sums a sequence and interval.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Interval = tuple[float, float]
FULL: Interval = (0.0, 1.0)
HYSTERESIS = 3.0
FOLDS = 8
LEAST_SEQUENCES = 2 * FOLDS


def candidates(block_size: int) -> list[Interval]:
    """[0, 1], then widths 0.5 to 0.9 at starts in steps of 0.05; at block size 1 also [1, 1]."""
    found = [FULL]
    for width in range(50, 100, 10):
        found += [(start / 100, (start + width) / 100) for start in range(0, 101 - width, 5)]
    return [*found, (1.0, 1.0)] if block_size == 1 else found


@dataclass(frozen=True)
class IntervalVariance:
    """Variance of a block's loss (nats a token, squared) under an interval, and its standard error over text and noise.

    Both are infinite at block size 1 from rate 0, where the variance is. The sample's variance of a larger block is
    finite even there, while the true one is not: its standard error says little.
    """

    low: float
    high: float
    variance: float
    standard_error: float


@dataclass(frozen=True)
class IntervalSearch:
    """The variance of every candidate that the text can tell, for one block size.

    _folds: each within parts of the text, [intervals, FOLDS].
    """

    block_size: int
    found: tuple[IntervalVariance, ...]
    _folds: NDArray[np.float64]

    @property
    def best(self) -> IntervalVariance:
        """That of least variance."""
        return min(self.found, key=lambda interval: interval.variance)

    def follow(self, current: Interval) -> Interval:
        """The best interval where it clearly beats the current one, else the current one.

        Clearly: over parts of the text, the mean logarithm of their variances' ratio is above three standard errors.
        Text and noise are common to both. A difference would not do: an interval that reaches 0 has so heavy a tail
        that one block can carry its variance and hide how bad it is. An interval that is no candidate gives way.
        """
        best = self.found.index(self.best)
        at = next((i for i, interval in enumerate(self.found) if (interval.low, interval.high) == current), None)
        if at is None and current in candidates(self.block_size):
            return current
        if at is not None and math.isfinite(self.found[at].variance):
            with np.errstate(invalid="ignore", divide="ignore"):
                gain = np.log(self._folds[at] / self._folds[best])
                # An unbiased variance of little text may be below 0, and tells nothing then.
                clear = gain.mean() > HYSTERESIS * gain.std(ddof=1) / math.sqrt(FOLDS)
            if not clear:
                return current
        return self.best.low, self.best.high


def block_moments(block_nll: Tensor, block_rate: Tensor, block_size: int, counted: Tensor | None = None) -> Tensor:
    """float64 [intervals, sequences, 3]: number, sum of X and sum of X² of the blocks inside each candidate.

    block_nll: float64 [draws, sequences, blocks], nats of the masked tokens of a block; block_rate: the rate with which
    it was masked, of the same shape; counted: bool [sequences, blocks], those that hold text (default: all).
    At block size 1 all rates are 1: a token's nll m/p under any interval has the mean nll and the mean square
    nll² E[1/p], which is exact.
    """
    text = torch.ones_like(block_nll) if counted is None else counted.double().expand_as(block_nll)
    moments = []
    for low, high in candidates(block_size):
        if block_size == 1:
            inside, loss = text, block_nll * text
            square = torch.where(loss != 0, loss.square() * _mean_reciprocal(low, high), 0.0)
        else:
            inside = ((block_rate >= low) & (block_rate <= high) & (block_rate > 0)).double() * text
            loss = torch.where(inside > 0, block_nll / (block_rate.double() * block_size), 0.0)
            square = loss.square()
        moments.append(torch.stack([part.sum((0, 2)) for part in (inside, loss, square)], 1))
    return torch.stack(moments)


def search_intervals(moments: Tensor, block_size: int) -> IntervalSearch:
    """The search over all sequences' `block_moments`, of every data-parallel rank.

    Candidates that meet fewer than two sequences in one part of the text are left out.
    ValueError: fewer than LEAST_SEQUENCES.
    """
    sums = moments.double().numpy()
    if sums.shape[1] < LEAST_SEQUENCES:
        raise ValueError(
            f"the interval search has {sums.shape[1]} sequences and needs {LEAST_SEQUENCES}: take more held-out text"
        )
    told = np.all([(sums[:, part::FOLDS, 0] > 0).sum(1) >= 2 for part in range(FOLDS)], axis=0)
    sums = sums[told]
    # What one sequence adds is taken off again for the jackknife.
    each = np.concatenate([sums, np.square(sums[..., :2])], axis=2)
    total = each.sum(1)
    with np.errstate(invalid="ignore"):
        variance, without = _variance(total), _variance(total[:, None] - each)
        folds = np.stack([_variance(each[:, part::FOLDS].sum(1)) for part in range(FOLDS)], axis=1)
    found = tuple(
        IntervalVariance(low, high, float(value), _jackknife_error(rest) if math.isfinite(value) else math.inf)
        for (low, high), value, rest in zip(
            np.array(candidates(block_size))[told].tolist(), variance, without, strict=True
        )
    )
    return IntervalSearch(block_size, found, folds)


def _variance(total: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of sums over sequences [..., 5]: blocks, X, X², and the squares of a sequence's first two."""
    blocks, loss, square, blocks_squared, loss_squared = np.moveaxis(total, -1, 0)
    result: NDArray[np.float64] = square / blocks - (loss**2 - loss_squared) / (blocks**2 - blocks_squared)
    return result


def _jackknife_error(without: NDArray[np.float64]) -> float:
    """Standard error of a statistic from its values without each of n sequences (Efron & Stein, 1981)."""
    count = len(without)
    return float(math.sqrt((count - 1) / count * np.square(without - without.mean()).sum()))


def _mean_reciprocal(low: float, high: float) -> float:
    """E[1/p] under U[low, high]."""
    if low == high:
        return 1 / low
    return math.log(high / low) / (high - low) if low else math.inf
