"""Find the clipped interval of mask rates that gives the training loss the least variance.

Why clip: the weight 1/p makes a block with few masks very loud, and a block that is masked almost whole says little
about the text. Drawing p from U[β, ω] alone avoids both ends (BD3-LM: Arriola et al., ICLR 2025, section 5.2).

Let a block be masked at rate p, and let its masked tokens have the negative log-likelihood S. Its loss a token is
X = S / (p · block size). Evaluation draws p from U[0, 1]. The blocks whose rate falls inside an interval are a sample
of U[β, ω], so one evaluation pass measures every interval, on the same text, noise levels and masks. The paper runs
one evaluation for each interval.

The variance is the mean of X² minus the mean of X · X' over pairs of blocks from different sequences. Blocks of one
sequence share their text and have stratified noise levels, so they are not independent, and the usual sample
variance would be biased; pairs from different sequences are independent. The estimate needs three sums for each
sequence and interval: the number of blocks, the sum of X and the sum of X².
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
# Standard errors by which another interval must be better before training moves to it. Without such a margin the
# interval would change at almost every validation, between neighbours that differ by noise alone.
HYSTERESIS = 3.0
# Parts of the text that each give a variance of their own, from which the standard error of a gain follows.
FOLDS = 8
# Two sequences in each part: a pair of different sequences is the least that the variance needs.
LEAST_SEQUENCES = 2 * FOLDS


def candidates(block_size: int) -> list[Interval]:
    """Return the intervals to compare: [0, 1], then widths 0.5 to 0.9 that start at multiples of 0.05.

    At block size 1 also [1, 1]: with every token masked the loss is the exact negative log-likelihood.
    """
    intervals = [FULL]
    # In hundredths, so that the ends are the floats nearest to their decimal numbers: 0.1 + 0.6 would not be 0.7.
    for width in range(50, 100, 10):
        intervals += [(start / 100, (start + width) / 100) for start in range(0, 101 - width, 5)]
    return [*intervals, (1.0, 1.0)] if block_size == 1 else intervals


@dataclass(frozen=True)
class IntervalVariance:
    """Variance of a block's loss (nats a token, squared) under an interval, and its standard error over text and noise.

    Both are infinite for intervals that start at rate 0 at block size 1, where E[1/p] is computed exactly. The true
    variance of larger blocks is infinite there, too, but the estimate from a sample is finite: its standard error
    says little.
    """

    low: float
    high: float
    variance: float
    standard_error: float


@dataclass(frozen=True)
class IntervalSearch:
    """The variance of every candidate interval with enough blocks in the text, for one block size.

    _folds: the variances within each part of the text, [intervals, FOLDS].
    """

    block_size: int
    variances: tuple[IntervalVariance, ...]
    _folds: NDArray[np.float64]

    @property
    def best(self) -> IntervalVariance:
        """Return the interval of the least variance."""
        return min(self.variances, key=lambda interval: interval.variance)

    def follow(self, current: Interval) -> Interval:
        """Return the best interval where it is clearly better than the current one, else the current one.

        Clearly means: the mean over parts of the text of log(current variance / best variance) is above HYSTERESIS
        standard errors. Both variances come from the same text and noise, which cancels most of the noise. The
        logarithm is needed: an interval that reaches 0 has so heavy a tail that a single block can make up its
        variance, and in a difference this block would hide that the interval is bad in every other part, too.
        A current interval that is no candidate is always replaced.
        """
        best = self.variances.index(self.best)
        at = next((i for i, interval in enumerate(self.variances) if (interval.low, interval.high) == current), None)
        if at is None and current in candidates(self.block_size):
            # The text had too few blocks in the current interval to measure it.
            return current
        if at is not None and math.isfinite(self.variances[at].variance):
            with np.errstate(invalid="ignore", divide="ignore"):
                gain = np.log(self._folds[at] / self._folds[best])
                # An unbiased estimate from little text may be below 0. Its logarithm is nan, the comparison is then
                # false, and the current interval stays.
                clear = gain.mean() > HYSTERESIS * gain.std(ddof=1) / math.sqrt(FOLDS)
            if not clear:
                return current
        return self.best.low, self.best.high


def block_moments(block_nll: Tensor, block_rate: Tensor, block_size: int, counted: Tensor | None = None) -> Tensor:
    """Return float64 [intervals, sequences, 3]: number, sum of X and sum of X² of the blocks inside each candidate.

    block_nll: float64 [draws, sequences, blocks], nats of the masked tokens of a block; block_rate: the rate with which
    it was masked, of the same shape; counted: bool [sequences, blocks], the blocks that hold text (default: all).
    """
    text = torch.ones_like(block_nll) if counted is None else counted.double().expand_as(block_nll)
    moments = []
    for low, high in candidates(block_size):
        if block_size == 1:
            # Evaluation masks every token here, so no rate is drawn and the moments are computed exactly. A token is
            # masked (m = 1) with probability p and its loss is X = nll · m / p, so E[X] = nll and
            # E[X²] = nll² · E[1/p]. The nll itself does not depend on p: the token has no neighbours in its block.
            inside, loss = text, block_nll * text
            square = torch.where(loss != 0, loss.square() * _mean_reciprocal(low, high), 0.0)
        else:
            inside = ((block_rate >= low) & (block_rate <= high) & (block_rate > 0)).double() * text
            loss = torch.where(inside > 0, block_nll / (block_rate.double() * block_size), 0.0)
            square = loss.square()
        moments.append(torch.stack([part.sum((0, 2)) for part in (inside, loss, square)], 1))
    return torch.stack(moments)


def search_intervals(moments: Tensor, block_size: int) -> IntervalSearch:
    """Return the variance of each candidate from the `block_moments` of all sequences of all data-parallel ranks.

    Candidates with blocks in fewer than two sequences of a part of the text are left out.
    ValueError: fewer than LEAST_SEQUENCES sequences.
    """
    sums = moments.double().numpy()
    if sums.shape[1] < LEAST_SEQUENCES:
        raise ValueError(
            f"the interval search has {sums.shape[1]} sequences and needs {LEAST_SEQUENCES}: take more held-out text"
        )
    measurable = np.all([(sums[:, part::FOLDS, 0] > 0).sum(1) >= 2 for part in range(FOLDS)], axis=0)
    sums = sums[measurable]
    # The squares of each sequence's own sums let `_variance` remove pairs of blocks within one sequence.
    each = np.concatenate([sums, np.square(sums[..., :2])], axis=2)
    total = each.sum(1)
    with np.errstate(invalid="ignore"):
        variance, without = _variance(total), _variance(total[:, None] - each)
        folds = np.stack([_variance(each[:, part::FOLDS].sum(1)) for part in range(FOLDS)], axis=1)
    variances = tuple(
        IntervalVariance(low, high, float(value), _jackknife_error(rest) if math.isfinite(value) else math.inf)
        for (low, high), value, rest in zip(
            np.array(candidates(block_size))[measurable].tolist(), variance, without, strict=True
        )
    )
    return IntervalSearch(block_size, variances, folds)


def _variance(total: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the variance from sums over sequences [..., 5]: n, ΣX, ΣX², Σn_s² and Σ(ΣX)_s², s being a sequence.

    (ΣX)² − Σ_s (ΣX)_s² is the sum of X · X' over pairs from different sequences, n² − Σ_s n_s² is their number.
    """
    blocks, loss, square, blocks_squared, loss_squared = np.moveaxis(total, -1, 0)
    result: NDArray[np.float64] = square / blocks - (loss**2 - loss_squared) / (blocks**2 - blocks_squared)
    return result


def _jackknife_error(without: NDArray[np.float64]) -> float:
    """Return the standard error of a statistic from its values without each of n sequences (Efron & Stein, 1981)."""
    count = len(without)
    return float(math.sqrt((count - 1) / count * np.square(without - without.mean()).sum()))


def _mean_reciprocal(low: float, high: float) -> float:
    """Return E[1/p] for p from U[low, high]: log(high / low) / (high − low)."""
    if low == high:
        return 1 / low
    return math.log(high / low) / (high - low) if low else math.inf
