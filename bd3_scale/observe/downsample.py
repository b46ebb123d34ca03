"""Choose the points of a long curve that a picture shows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# A chart is about as many pixels wide; each bin keeps two points.
BINS = 600
# The running median covers this share of the points before it.
_WINDOW_SHARE = 50


def extremes(steps: Sequence[int], values: Sequence[float], bins: int = BINS) -> list[int]:
    """Return the indices of the points to draw: the lowest and the highest of each bin, the first and the last point.

    A bin that kept a mean would hide a spike of one step. Few points are all kept.

    Args:
        steps: rising, [n].
        values: finite, [n].
        bins: of equal width in steps; at most 2 · bins + 2 indices are returned.
    """
    if len(steps) <= 2 * bins:
        return list(range(len(steps)))
    at, of = np.asarray(steps), np.asarray(values, dtype=float)
    edges = np.searchsorted(at, np.linspace(at[0], at[-1], bins + 1)[1:-1])
    kept = {0, len(steps) - 1}
    for first, end in zip([0, *edges], [*edges, len(steps)], strict=True):
        if first < end:
            kept |= {int(first + of[first:end].argmin()), int(first + of[first:end].argmax())}
    return sorted(kept)


def running_median(values: Sequence[float], at: Sequence[int] | None = None) -> list[float]:
    """Return the median of the latest fiftieth of the points at each index of `at`; of fewer points at the start.

    The window needs no later point, so that the curve of a run that goes on does not change afterwards.
    """
    whole: NDArray[np.float64] = np.asarray(values, dtype=float)
    window = max(1, len(whole) // _WINDOW_SHARE)
    indices = range(len(whole)) if at is None else at
    return [float(np.median(whole[max(0, i + 1 - window) : i + 1])) for i in indices]
