"""How evenly a mixture's experts are busy: what a run records of it, and its picture.

Legend: S layers with experts, 2 streams (noisy rows, clean rows), E experts; counts are rows sent to an expert.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bd3_scale.resilience.files import write_atomically

PICTURE, FILE = "experts.png", "experts.json"
STREAMS = ("noisy", "clean")
# The picture and the file are of so many last steps: single ones scatter.
_STEPS = 100
Counts = NDArray[np.int64]


def load_metrics(counts: Counts, first_layer: int) -> dict[str, float]:
    """Return the metrics of a step's counts [S, 2, E], whose first layer has that number.

    By layer and stream, and the worst layer of both streams together: the largest count over the mean, which is 1
    where experts are evenly busy, and how many experts were dead, sent no row.
    """
    whole = counts.sum(1)
    found = {
        "experts/max_over_mean": float((whole.max(1) / whole.mean(1)).max()),
        "experts/dead": float((whole == 0).sum()),
    }
    for layer, of_streams in enumerate(counts, first_layer):
        for stream, each in zip(STREAMS, of_streams, strict=True):
            # Of the last layer clean rows are keys alone.
            if each.any():
                found[f"experts/layer_{layer}_{stream}_max_over_mean"] = float(each.max() / each.mean())
                found[f"experts/layer_{layer}_{stream}_dead"] = float((each == 0).sum())
    return found


class ExpertLoad:
    """The load of the last steps of a run, in `experts.json` and as `experts.png`."""

    def __init__(self, folder: Path, first_layer: int) -> None:
        self._folder, self._first_layer = folder, first_layer
        self._steps: deque[tuple[int, Counts]] = deque(maxlen=_STEPS)

    def add(self, step: int, counts: Counts) -> None:
        """Take the counts [S, 2, E] of a step."""
        self._steps.append((step, counts))

    def write(self) -> None:
        """Write both files, where there were steps."""
        if not self._steps:
            return
        counts = np.sum([each for _, each in self._steps], axis=0)
        steps = [self._steps[0][0], self._steps[-1][0]]
        record = {"steps": steps, "first_layer": self._first_layer}
        record |= {stream: counts[:, place].tolist() for place, stream in enumerate(STREAMS)}
        write_atomically(self._folder / FILE, json.dumps(record) + "\n")
        _draw(counts, self._first_layer, steps, self._folder / PICTURE)


def _draw(counts: Counts, first_layer: int, steps: list[int], out: Path) -> None:
    """Draw the share of each expert by layer, a panel for each stream, as a PNG; experts lie in the order of their
    load, so that a row that falls steeply is a layer that few experts work for.
    """
    # The object interface needs no display and leaves pyplot's global state alone.
    from matplotlib.figure import Figure

    panels = list(_loads(counts))
    figure = Figure(figsize=(8, 1.2 + len(panels) * max(1.4, 0.16 * len(counts))), layout="constrained")
    for axes, (stream, loads) in zip(np.atleast_1d(figure.subplots(len(panels), sharex=True)), panels, strict=True):
        layers, experts = loads.shape
        image = axes.imshow(
            loads,
            aspect="auto",
            cmap="magma",
            vmin=0,
            vmax=max(2.0, float(np.nanmax(loads))),
            extent=(0.5, experts + 0.5, first_layer + layers - 0.5, first_layer - 0.5),
        )
        dead = int((loads == 0).sum())
        title = f"{stream} rows, steps {steps[0]} to {steps[1]}: busiest {np.nanmax(loads):.2f} × mean, {dead} dead"
        axes.set(title=title, ylabel="layer")
        axes.yaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=axes, label="rows / mean")
    axes.set(xlabel="expert, in the order of its load")
    figure.savefig(out, format="png", dpi=150)


def _loads(counts: Counts) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Yield each stream that has rows, and its counts over the mean, falling, [S, E]; NaN of layers without rows."""
    for place, stream in enumerate(STREAMS):
        found = np.sort(counts[:, place].astype(float), axis=1)[:, ::-1]
        mean = found.mean(1, keepdims=True)
        if mean.any():
            yield stream, np.divide(found, mean, out=np.full_like(found, np.nan), where=mean > 0)
