"""Hold the records of a scale, and answer what the sections need from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reproduction.rows import Row, Scale, rows
from reproduction.statistics import Difference, Measured, Seeds, interval

HELD_OUT = "held-out"
MAIN = ("ar", "l4", "l8", "l16", "mdlm")


@dataclass(frozen=True)
class Findings:
    """The records of a scale. records: by row and seed; texts: names of texts measured besides held-out text."""

    scale: Scale
    records: dict[tuple[str, int], dict[str, Any]]
    texts: tuple[str, ...]

    def row(self, name: str) -> Row:
        """Return a row of the scale by its name."""
        return next(row for row in rows(self.scale) if row.name == name)

    def of(self, name: str) -> list[dict[str, Any]]:
        """Return the records of a row, one for each finished seed."""
        seeds = self.row(name).seeds or self.scale.seeds
        return [self.records[name, seed] for seed in seeds if (name, seed) in self.records]

    def has(self, *names: str) -> bool:
        """Tell whether all seeds of these rows are finished."""
        return all(len(self.of(name)) == len(self.row(name).seeds or self.scale.seeds) for name in names)

    def measured(self, name: str, text: str = HELD_OUT, block_size: int | None = None) -> Measured:
        """Return a row's results on a text, at its first block size by default."""
        size = block_size or self.row(name).block_sizes[0]
        return Measured.of(self.of(name), f"{text}, L'={size}")

    def seeds(self, text: str = HELD_OUT) -> Seeds:
        """Return the spread over seeds, pooled over all rows with several seeds that were measured on `text`."""
        several = [row for row in rows(self.scale) if len(row.seeds or self.scale.seeds) > 1]
        if text != HELD_OUT:
            several = [row for row in several if row.writes]
        return Seeds.pooled([self.measured(row.name, text) for row in several if self.has(row.name)])

    def compare(self, first: str, second: str, text: str = HELD_OUT) -> Difference:
        """Return the difference between two rows on a text."""
        return Difference.between(self.measured(first, text), self.measured(second, text), self.seeds(text))

    def cells(self, measured: Measured) -> list[str]:
        """Return a row's cells: nats with their 95% interval, perplexity, and bits per byte if a token is a byte."""
        nats = measured.mean
        cells = [f"{nats:.4f} ± {interval(measured, self.seeds()):.4f}", f"{math.exp(nats):.3f}"]
        return cells + ([f"{nats / math.log(2):.3f}"] if self.scale.unit == "byte" else [])

    @property
    def header(self) -> list[str]:
        """Return the header of a row's name and `cells`."""
        unit = self.scale.unit
        return ["model", f"nats per {unit}", f"perplexity per {unit}", *(["bits per byte"] if unit == "byte" else [])]


def table(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """Return a table in Markdown."""
    rule = "|".join(["---"] * len(header))
    return "\n".join(
        [f"| {' | '.join(header)} |", f"|{rule}|", *(f"| {' | '.join(map(str, line))} |" for line in lines)]
    )
