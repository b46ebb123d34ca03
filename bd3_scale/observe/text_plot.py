"""Draw a curve with characters, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

import numpy as np

# A Braille character has 2 × 4 dots; bits by column and row, see the Unicode chart U+2800.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_BLANK = 0x2800
# Such as -1.23e-300 and a space.
_LABEL = 11


def text_plot(steps: Sequence[int], values: Sequence[float], width: int, height: int) -> list[str]:
    """Return lines with the medians of a curve, and its highest and lowest as labels.

    Args:
        steps: rising, [n], n ≥ 1.
        values: finite, [n].
        width, height: in characters, labels included; at least 14 × 2.
    """
    columns = _joined(_medians(steps, values, 2 * (width - _LABEL)))
    low, high = min(columns.values()), max(columns.values())
    rows = 4 * height
    levels = {x: round((high - y) / (high - low) * (rows - 1)) if high > low else rows // 2 for x, y in columns.items()}
    cells = [[_BLANK] * (width - _LABEL) for _ in range(height)]
    before: int | None = None
    for x, level in sorted(levels.items()):
        for row in _between(before, level):
            cells[row // 4][x // 2] |= _DOTS[x % 2][row % 4]
        before = level
    labels = [f"{high:.3g}", *[""] * (height - 2), f"{low:.3g}"]
    return [f"{label:>{_LABEL - 1}} " + "".join(map(chr, row)) for label, row in zip(labels, cells, strict=True)]


def _medians(steps: Sequence[int], values: Sequence[float], columns: int) -> dict[int, float]:
    """Return the median of the values in each column of dots that has one."""
    first, span = steps[0], max(1, steps[-1] - steps[0])
    of_columns: dict[int, list[float]] = {}
    for step, value in zip(steps, values, strict=True):
        of_columns.setdefault((step - first) * (columns - 1) // span, []).append(value)
    return {column: median(each) for column, each in of_columns.items()}


def _joined(columns: Mapping[int, float]) -> dict[int, float]:
    """Return a value for every column from the first to the last, on straight lines between those that have one."""
    given = sorted(columns)
    every = range(given[0], given[-1] + 1)
    return dict(zip(every, np.interp(every, given, [columns[x] for x in given]).tolist(), strict=True))


def _between(before: int | None, level: int) -> range:
    """Return the rows from the last column's level to this one's, so that a steep curve has no holes."""
    if before is None or before == level:
        return range(level, level + 1)
    return range(before + 1, level + 1) if before < level else range(level, before)
