"""Draw the page's pictures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from reproduction.findings import MAIN, Findings
from reproduction.masking import (
    best_clipped,
    clipped_name,
    clipped_sizes,
    loss_variance,
    search_results,
    searched_rows,
    tenths,
)
from reproduction.rows import INTERVALS, LONG
from reproduction.statistics import interval


def perplexity(findings: Findings, out: Path) -> None:
    """Draw section 1: NELBOs with their intervals, and each seed."""
    figure, axes = _figure(1)
    values = [findings.measured(name) for name in MAIN]
    titles = [findings.row(name).title for name in MAIN]
    margins = [interval(value, findings.seeds()) for value in values]
    axes[0].errorbar(titles, [value.mean for value in values], margins, fmt="o", capsize=4, label="mean, 95% interval")
    for index, value in enumerate(values):
        axes[0].plot([index] * len(value.by_seed), value.by_seed, "x", color="C1", label=None if index else "seeds")
    axes[0].set(ylabel=f"nats per {findings.scale.unit}, held-out")
    _save(figure, axes, out)


def intervals(findings: Findings, out: Path) -> None:
    """Draw section 3: NELBO against the loss's variance, by interval."""
    figure, axes = _figure(len(clipped_sizes(findings)))
    for panel, size in zip(axes, clipped_sizes(findings), strict=True):
        for low, high in INTERVALS:
            nats = findings.measured(clipped_name(size, (low, high))).mean
            panel.plot(loss_variance(findings, size, (low, high)), nats, "o", label=f"U[{low:g}, {high:g}]")
        panel.set(
            title=f"L'={size}",
            xlabel="variance of a block's loss",
            ylabel=f"nats per {findings.scale.unit}, held-out",
            xlim=(0, None),
        )
    _save(figure, axes, out)


def searched(findings: Findings, out: Path) -> None:
    """Draw section 4: the searched intervals over steps, and the loss by mask rate."""
    rows = searched_rows(findings)
    figure, axes = _figure(len(rows) + 1)
    for panel, (size, name) in zip(axes, rows.items(), strict=False):
        for number, record in enumerate(findings.of(name)):
            steps, low, high = (list(values) for values in zip(*search_results(record, size), strict=True))
            # A searched interval is used until the next search.
            panel.step(steps, low, where="post", color=f"C{number}", label=f"seed {record['seed']}")
            panel.step(steps, high, where="post", color=f"C{number}")
            panel.fill_between(steps, low, high, step="post", color=f"C{number}", alpha=0.15)
        panel.set(title=f"L'={size}", xlabel="step", ylabel="mask rates in training", ylim=(-0.05, 1.05))
    for size in clipped_sizes(findings):
        name = best_clipped(findings, size)
        blocks, losses, _ = tenths(findings, name).T
        axes[-1].plot(np.arange(0.05, 1, 0.1), losses / blocks, "o-", markersize=4, label=findings.row(name).title)
    axes[-1].set(
        title="section 3's best models", xlabel="mask rate", ylabel=f"loss: nats per {findings.scale.unit}, held-out"
    )
    _save(figure, axes, out)


def samples(findings: Findings, out: Path) -> None:
    """Draw section 7: generative perplexity against denoising passes per token."""
    figure, axes = _figure(1)
    below = False  # labels of neighbouring points alternate between above and below
    for number, name in enumerate(MAIN):
        for sampler in findings.of(name)[0]["samples"]:
            if sampler == LONG:
                continue
            parts: list[dict[str, Any]] = [record["samples"][sampler] for record in findings.of(name)]
            x = float(np.mean([part["nfe_per_token"] for part in parts]))
            y = math.exp(float(np.mean([math.log(part["perplexity"]) for part in parts])))
            plain = sampler in ("first-hitting", "one by one")
            axes[0].plot(
                x, y, "o" if plain else ".", color=f"C{number}", label=findings.row(name).title if plain else None
            )
            if not plain:
                below = not below
                position = {"xytext": (-3, -9) if below else (-3, 3), "textcoords": "offset points", "ha": "right"}
                axes[0].annotate(sampler, (x, y), fontsize=7, **position)
    axes[0].set(
        xlim=(0, None), xlabel="denoising passes per token", ylabel=f"generative perplexity per {findings.scale.unit}"
    )
    _save(figure, axes, out)


def _figure(panels: int) -> tuple[Any, Any]:
    # The object interface needs no display and leaves pyplot's global state alone.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7 if panels == 1 else 4 * panels, 4), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _save(figure: Any, axes: Any, out: Path) -> None:
    for panel in axes:
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize=8)
    figure.savefig(out, format="png", dpi=110)
