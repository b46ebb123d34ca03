"""Turn the metrics of a run into the figures of its report."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bd3_scale.observe.downsample import BINS, extremes, running_median
from bd3_scale.resilience.terminal import clean

Record = Mapping[str, Any]
# Of metrics that no figure below knows, such as a plug-in's.
_MOST_OTHERS = 24
_DIGITS = 6
_MANY_LINES = 12
_LOW, _HIGH = "interval/mask_rate_low_block_", "interval/mask_rate_high_block_"


@dataclass(frozen=True)
class Figure:
    """A chart over steps.

    lines: by regular expression of a metric's name, the label of its line, in which `{0}` is the expression's group.
    smooth: the running median is drawn over faint single values.
    points: values are few, and each is marked.
    log: the axis is logarithmic at first; a reader can switch it.
    scale: what values are multiplied by to have the unit.
    """

    id: str
    title: str
    unit: str
    lines: Mapping[str, str] = field(default_factory=dict)
    smooth: bool = False
    points: bool = False
    log: bool = False
    scale: float = 1.0


_BLOCKS, _SOURCE = "blocks of {0}", "source {0}"
INTERVALS = Figure("intervals", "Searched intervals of mask rates", "mask rate", points=True)
NELBO = Figure(
    "nelbo",
    "Held-out NELBO",
    "nats per token",
    {
        "eval/nelbo": "held-out text",
        r"eval/nelbo_block_(\d+)": _BLOCKS,
        "eval/nelbo_source_(.+)": _SOURCE,
    },
    points=True,
)
FIGURES = (
    Figure("loss", "Training loss", "nats per token", {"train/loss": "training loss"}, smooth=True),
    NELBO,
    Figure(
        "loss_parts",
        "Training loss by block size and source",
        "nats per token, running median",
        {r"train/loss_block_(\d+)": _BLOCKS, "train/loss_source_(.+)": _SOURCE},
        smooth=True,
    ),
    INTERVALS,
    Figure(
        "variance",
        "Variance of a block's loss",
        "squared nats per token",
        {
            r"interval/loss_variance_block_(\d+)": "blocks of {0}, in its interval",
            r"interval/loss_variance_unclipped_block_(\d+)": "blocks of {0}, mask rates 0 to 1",
        },
        points=True,
        log=True,
    ),
    Figure("throughput", "Throughput", "tokens per second", {"perf/tokens_per_second": "all ranks"}, smooth=True),
    Figure("mfu", "Model FLOPs utilisation (MFU)", "%", {"perf/mfu": "MFU"}, smooth=True, scale=100.0),
    Figure(
        "step_parts",
        "Time of a step and its parts",
        "seconds, running median",
        {
            "perf/step_seconds": "whole step",
            "perf/(.+)_seconds": "{0}",
            "data/wait_seconds": "waiting for data",
        },
        smooth=True,
    ),
    Figure(
        "memory",
        "Peak memory of rank 0",
        "GiB",
        {"memory/peak_rss_bytes": "main memory", "memory/peak_cuda_bytes": "GPU memory", "memory/(.+)_bytes": "{0}"},
        scale=2.0**-30,
    ),
    Figure("lr", "Learning rate", "", {"train/lr": "learning rate"}),
    Figure("grad_norm", "Norm of the gradient before clipping", "", {"train/grad_norm": "norm"}, smooth=True, log=True),
    Figure(
        "experts",
        "Load of the experts: the busiest over the mean",
        "rows / mean, running median",
        {
            "experts/max_over_mean": "worst layer",
            r"experts/layer_(\d+)_(\w+)_max_over_mean": "layer {0}, {1} rows",
        },
        smooth=True,
    ),
    Figure(
        "dead_experts",
        "Experts without a row",
        "experts, running median",
        {"experts/dead": "all layers", r"experts/layer_(\d+)_(\w+)_dead": "layer {0}, {1} rows"},
        smooth=True,
    ),
    Figure(
        "saves",
        "Time of checkpoints",
        "seconds",
        {"checkpoint/seconds": "written in", "checkpoint/blocked_seconds": "training waited"},
        points=True,
    ),
)
# Shown elsewhere on the page, or a multiple of what is shown.
_NOT_DRAWN = {
    "step",
    "train/tokens",
    "eval/perplexity",
    "eval/nelbo_text_standard_error",
    "eval/nelbo_noise_standard_error",
    "checkpoint/tries",
    "checkpoint/failed",
    "checkpoint/slowdown",
}


def run_series(records: Sequence[Record]) -> dict[str, list[dict[str, Any]]]:
    """Return by figure the curves of a run, each with `label`, steps `x` and values `y`, rounded to six digits.

    A smoothed one has also `smooth`, its running median at the same steps, and one with a band has `low` and `high`. A
    figure without a value is left out. Values that are not finite, which a record holds as null, are left out.
    """
    columns = _columns(records)
    drawn = {figure.id: list(_curves(figure, columns)) for figure in FIGURES}
    drawn[INTERVALS.id] = list(_intervals(columns))
    return {name: curves for name, curves in drawn.items() if curves} | _others(columns)


def other_figures(ids: Iterable[str]) -> list[Figure]:
    """Return the figures of metrics that this module does not know, by the ids of `run_series`."""
    known = {figure.id for figure in FIGURES}
    return [Figure(name, name.removeprefix("other:"), "") for name in ids if name not in known]


def _columns(records: Sequence[Record]) -> dict[str, dict[int, float]]:
    """Return the finite values of each metric by rising step. Where a file holds a step twice the later one counts."""
    columns: dict[str, dict[int, float]] = {}
    for record in records:
        for name, value in record.items():
            if name != "step" and value is not None:
                columns.setdefault(name, {})[record["step"]] = float(value)
    return {name: dict(sorted(column.items())) for name, column in columns.items()}


def _matches(figure: Figure, columns: Mapping[str, Any]) -> dict[str, str]:
    """Return the metrics that a figure draws, with their labels, in its order; numbers in labels rise."""
    labels: dict[str, str] = {}
    for pattern, label in figure.lines.items():
        matches = [match for name in columns if name not in labels and (match := re.fullmatch(pattern, name))]
        for match in sorted(matches, key=lambda match: _natural(match[0])):
            labels[match[0]] = clean(label.format(*match.groups()))
    return labels


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d{1,18})", name)]


def _curves(figure: Figure, columns: Mapping[str, dict[int, float]]) -> Iterator[dict[str, Any]]:
    labels = _matches(figure, columns)
    for name, label in labels.items():
        # A mixture of 48 layers has 96 lines: the file stays small.
        curve = _curve(label, columns[name], figure, bins=BINS * _MANY_LINES // max(_MANY_LINES, len(labels)))
        if name == "eval/nelbo":
            curve |= _standard_errors(columns, curve)
        yield curve


def _curve(label: str, column: Mapping[int, float], figure: Figure, bins: int = BINS) -> dict[str, Any]:
    steps, values = list(column), [value * figure.scale for value in column.values()]
    kept = extremes(steps, values, bins)
    curve: dict[str, Any] = {"label": label, "x": [steps[i] for i in kept], "y": [_rounded(values[i]) for i in kept]}
    if figure.smooth and len(values) > 1:
        curve["smooth"] = [_rounded(value) for value in running_median(values, kept)]
    return curve


def _standard_errors(columns: Mapping[str, dict[int, float]], curve: Mapping[str, Any]) -> dict[str, Any]:
    """Return the band of one standard error around the NELBO.

    The errors of the drawn text and of the drawn noise are independent, so that their squares add.
    """
    text, noise = (columns.get(f"eval/nelbo_{kind}_standard_error", {}) for kind in ("text", "noise"))
    if not text and not noise:
        return {}
    errors = [math.hypot(text.get(step, 0.0), noise.get(step, 0.0)) for step in curve["x"]]
    pairs = list(zip(curve["y"], errors, strict=True))
    return {"low": [_rounded(y - e) for y, e in pairs], "high": [_rounded(y + e) for y, e in pairs]}


def _intervals(columns: Mapping[str, dict[int, float]]) -> Iterator[dict[str, Any]]:
    sizes = {name.removeprefix(_LOW) for name in columns if name.startswith(_LOW)}
    for size in sorted(sizes, key=_natural):
        low, high = columns[_LOW + size], columns.get(_HIGH + size, {})
        steps = [step for step in low if step in high]
        if steps:
            lows, highs = ([_rounded(column[step]) for step in steps] for column in (low, high))
            yield {"label": clean(f"blocks of {size}"), "x": steps, "low": lows, "high": highs, "stepped": True}


def _others(columns: Mapping[str, dict[int, float]]) -> dict[str, list[dict[str, Any]]]:
    known = {name for figure in FIGURES for name in _matches(figure, columns)} | _NOT_DRAWN
    names = [name for name in sorted(columns, key=_natural) if name not in known and not name.startswith((_LOW, _HIGH))]
    return {
        f"other:{clean(name)}": [_curve(clean(name), columns[name], Figure("", "", ""))]
        for name in names[:_MOST_OTHERS]
    }


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
