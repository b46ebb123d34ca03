"""Record and draw how evenly the experts of a mixture are loaded.

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
# The picture and the file sum up so many last steps: the counts of a single step scatter.
_STEPS = 100
Counts = NDArray[np.int64]


def load_metrics(counts: Counts, first_layer: int) -> dict[str, float]:
    """Return the metrics of a step's counts [S, 2, E], whose first layer has that number.

    They are given by layer and stream, and for the worst layer over both streams: the largest count over the mean,
    1 if all experts are equally loaded, and the number of dead experts, which got no row.
    """
    whole = counts.sum(1)
    metrics = {
        "experts/max_over_mean": float((whole.max(1) / whole.mean(1)).max()),
        "experts/dead": float((whole == 0).sum()),
    }
    for layer, of_streams in enumerate(counts, first_layer):
        for stream, each in zip(STREAMS, of_streams, strict=True):
            # In the last layer clean rows are only keys: no expert sees them.
            if each.any():
                metrics[f"experts/layer_{layer}_{stream}_max_over_mean"] = float(each.max() / each.mean())
                metrics[f"experts/layer_{layer}_{stream}_dead"] = float((each == 0).sum())
    return metrics


class ExpertLoad:
    """The load of the experts in the last steps of a run, for `experts.json` and `experts.png`."""

    def __init__(self, folder: Path, first_layer: int) -> None:
        self._folder, self._first_layer = folder, first_layer
        self._steps: deque[tuple[int, Counts]] = deque(maxlen=_STEPS)

    def add(self, step: int, counts: Counts) -> None:
        """Add the counts [S, 2, E] of a step."""
        self._steps.append((step, counts))

    def write(self) -> None:
        """Write both files, if there were steps."""
        if not self._steps:
            return
        counts = np.sum([each for _, each in self._steps], axis=0)
        steps = [self._steps[0][0], self._steps[-1][0]]
        record = {"steps": steps, "first_layer": self._first_layer}
        record |= {stream: counts[:, place].tolist() for place, stream in enumerate(STREAMS)}
        write_atomically(self._folder / FILE, json.dumps(record) + "\n")
        _draw(counts, self._first_layer, steps, self._folder / PICTURE)


def _draw(counts: Counts, first_layer: int, steps: list[int], out: Path) -> None:
    """Draw the load of each expert by layer as a PNG, with a panel for each stream.

    The experts of a layer are sorted by load: a row that falls steeply is a layer whose rows go to few experts.
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
    """Yield each stream with rows, and its counts over the mean [S, E], sorted down; NaN in layers without rows."""
    for place, stream in enumerate(STREAMS):
        loads = np.sort(counts[:, place].astype(float), axis=1)[:, ::-1]
        mean = loads.mean(1, keepdims=True)
        if mean.any():
            yield stream, np.divide(loads, mean, out=np.full_like(loads, np.nan), where=mean > 0)
