"""Draw pictures of a run."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from bd3_scale.observe.downsample import running_median
from bd3_scale.observe.metrics import read_metrics


def loss_curve(metrics: Path, out: Path) -> None:
    """Draw `train/loss` (nats a token, with its running median) and `eval/nelbo` of a metrics file over steps as a PNG.

    ValueError: the file holds no finite training loss.
    """
    records = read_metrics(metrics)
    train = [(r["step"], r["train/loss"]) for r in records if r.get("train/loss") is not None]
    held_out = [(r["step"], r["eval/nelbo"]) for r in records if r.get("eval/nelbo") is not None]
    if not train:
        raise ValueError(f"{metrics} holds no training loss: train for at least one step")

    # The object interface needs no display and leaves pyplot's global state alone.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    steps, losses = zip(*train, strict=True)
    medians = running_median(losses)
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="train loss")
    axes.plot(steps, medians, color="tab:blue", linewidth=1.6, label="train loss, running median")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", markersize=5, label="held-out NELBO")
    # Few tokens at a tiny mask rate can give a single step an extreme loss: it may lie outside the picture, the medians
    # may not.
    shown = [*np.percentile(losses, [1, 99]), *medians, *(nelbo for _, nelbo in held_out)]
    margin = 0.05 * (max(shown) - min(shown)) or 0.1
    axes.set(xlabel="step", ylabel="nats per token", ylim=(min(shown) - margin, max(shown) + margin))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(out, format="png", dpi=150)


def interval_curve(metrics: Path, out: Path) -> None:
    """Draw the searched intervals of `metrics.jsonl` over steps as a PNG, and below the variance of a block's loss.

    One panel shows the mask rates, the other the variance (squared nats a token) inside the interval and in all of
    [0, 1]. Without a search there is no picture.
    """
    records = read_metrics(metrics)
    keys_of_sizes = (
        re.fullmatch(r"interval/mask_rate_low_block_([0-9]{1,9})", key) for record in records for key in record
    )
    sizes = sorted({int(match[1]) for match in keys_of_sizes if match})
    if not sizes:
        return

    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    rates, variances = figure.subplots(2, sharex=True)
    for number, size in enumerate(sizes):
        searched = [record for record in records if f"interval/mask_rate_low_block_{size}" in record]
        steps = [record["step"] for record in searched]
        keys = ("mask_rate_low", "mask_rate_high", "loss_variance", "loss_variance_unclipped")
        values = [[record.get(f"interval/{key}_block_{size}") for record in searched] for key in keys]
        low, high, variance, whole = np.array(values, dtype=float)  # null is not a number
        color = f"C{number}"
        # An interval is used until the next evaluation.
        rates.fill_between(steps, low, high, step="post", color=color, alpha=0.25)
        rates.step(steps, np.transpose([low, high]), where="post", color=color, label=[f"blocks of {size}", None])
        variances.plot(steps, variance, "o-", color=color, label=f"blocks of {size}")
        variances.plot(steps, whole, "--", color=color, alpha=0.6)
    rates.set(ylabel="mask rates in training", ylim=(0, 1))
    variances.set(xlabel="step", ylabel="variance of a block's loss\n(dashed: mask rates 0 to 1)", yscale="log")
    for axes in (rates, variances):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(out, format="png", dpi=150)
