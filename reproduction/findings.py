"""The records of a scale, and what every section asks of them."""

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
    """records: by row and seed; texts: names of those measured beside held-out text."""

    scale: Scale
    records: dict[tuple[str, int], dict[str, Any]]
    texts: tuple[str, ...]

    def row(self, name: str) -> Row:
        return next(row for row in rows(self.scale) if row.name == name)

    def of(self, name: str) -> list[dict[str, Any]]:
        """The records of a row, one a seed that is done."""
        seeds = self.row(name).seeds or self.scale.seeds
        return [self.records[name, seed] for seed in seeds if (name, seed) in self.records]

    def has(self, *names: str) -> bool:
        """Every seed of these rows is done."""
        return all(len(self.of(name)) == len(self.row(name).seeds or self.scale.seeds) for name in names)

    def measured(self, name: str, text: str = HELD_OUT, block_size: int | None = None) -> Measured:
        size = block_size or self.row(name).block_sizes[0]
        return Measured.of(self.of(name), f"{text}, L'={size}")

    def seeds(self, text: str = HELD_OUT) -> Seeds:
        """The spread over seeds, pooled over every row with more than one that was measured on `text`."""
        several = [row for row in rows(self.scale) if len(row.seeds or self.scale.seeds) > 1]
        if text != HELD_OUT:
            several = [row for row in several if row.writes]
        return Seeds.pooled([self.measured(row.name, text) for row in several if self.has(row.name)])

    def compare(self, first: str, second: str, text: str = HELD_OUT) -> Difference:
        return Difference.between(self.measured(first, text), self.measured(second, text), self.seeds(text))

    def cells(self, measured: Measured) -> list[str]:
        """Of held-out text: nats with their 95% interval, and perplexity, a token of the scale; bits a byte if it is a
        byte."""
        nats = measured.mean
        cells = [f"{nats:.4f} ± {interval(measured, self.seeds()):.4f}", f"{math.exp(nats):.3f}"]
        return cells + ([f"{nats / math.log(2):.3f}"] if self.scale.unit == "byte" else [])

    @property
    def header(self) -> list[str]:
        """Of a row's name and `cells`."""
        unit = self.scale.unit
        return ["", f"nats a {unit}", f"perplexity a {unit}", *(["bits a byte"] if unit == "byte" else [])]


def table(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """In Markdown."""
    rule = "|".join(["---"] * len(header))
    return "\n".join(
        [f"| {' | '.join(header)} |", f"|{rule}|", *(f"| {' | '.join(map(str, line))} |" for line in lines)]
    )
