"""Sections 3, 4, 7 and 8: intervals of mask rates, samples, efficiency."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from tools.reproduction import paper
from tools.reproduction.findings import HELD_OUT, MAIN, Findings, table
from tools.reproduction.rows import BLOCKS, INTERVALS, LONG
from tools.reproduction.statistics import FAILS, HOLDS, UNDECIDED, Difference, Seeds, together


def clipped_sizes(found: Findings) -> tuple[int, ...]:
    return (*found.scale.clipped, found.scale.length)


def clipped_name(size: int, interval: tuple[float, float]) -> str:
    return f"l{size}-{interval[0]}-{interval[1]}"


def loss_variance(found: Findings, size: int, interval: tuple[float, float]) -> float:
    """Of a block's loss under the interval that the model was trained with, on held-out text."""
    text = found.of(clipped_name(size, interval))[0]["texts"][f"{HELD_OUT}, L'={size}"]
    return next(one["variance"] for one in text["intervals"] if (one["low"], one["high"]) == interval)


def clipped(found: Findings) -> str:
    parts, lines, verdicts = [], [], []
    for size in clipped_sizes(found):
        variances = {interval: loss_variance(found, size, interval) for interval in INTERVALS}
        best = min(variances, key=variances.__getitem__)
        for interval in INTERVALS:
            published = paper.CLIPPED.get(size, {}).get(interval)
            name = clipped_name(size, interval)
            figures = [f"{published[0]} / {published[1]}"] if published else [""]
            lines.append(
                [found.row(name).title, *found.cells(found.measured(name)), f"{variances[interval]:.4f}", *figures]
            )
        if best == (0.0, 1.0):
            parts.append(f"L'={size}: no interval has less variance than [0, 1].")
            verdicts.append(FAILS)
            continue
        difference = found.compare(clipped_name(size, (0.0, 1.0)), clipped_name(size, best))
        verdicts.append(difference.verdict())
        parts.append(
            f"L'={size}: U[{best[0]:g}, {best[1]:g}] has the least variance; U[0, 1] costs {difference} nats a "
            f"{found.scale.unit} more: {difference.verdict()}."
        )
    return "\n\n".join(
        [
            table([*found.header, "variance of a block's loss", "paper: perplexity / variance"], lines),
            "The paper: at every L' an interval narrower than [0, 1] has less variance, and the model that trains with "
            f"the one of least variance is the better one. **Here: {together(verdicts)}.** Half of section 1's tokens, "
            "one seed.",
            *parts,
        ]
    )


def chosen(record: dict[str, Any], size: int) -> list[tuple[int, float, float]]:
    """What training followed: step, β, ω of every search."""
    keys = [f"mask_rate_{end}_block_{size}" for end in ("low", "high")]
    return [(one["step"], one[keys[0]], one[keys[1]]) for one in record["training"]["searches"]]


def searched(found: Findings) -> str:
    rows = {**{size: f"l{size}" for size in BLOCKS}, found.scale.length: "mdlm"}
    lines, middles = [], {}
    for size, name in rows.items():
        ends = [chosen(record, size)[-1] for record in found.of(name)]
        middles[size] = [(low + high) / 2 for _, low, high in ends]
        published = paper.SEARCHED.get(size)
        lines.append(
            [
                f"L'={size}",
                ", ".join(f"[{low:g}, {high:g}]" for _, low, high in ends),
                f"[{published[0]:g}, {published[1]:g}]" if published else "",
            ]
        )
    means = [float(np.mean(values)) for values in middles.values()]
    falling = all(later <= earlier for earlier, later in itertools.pairwise(means))
    verdict = UNDECIDED if len(set(means)) == 1 else HOLDS if falling else FAILS
    return "\n\n".join(
        [
            table(["", "interval at the end, by seed", "paper"], lines),
            f"The paper: the smaller the blocks, the heavier the masking that the search chooses. **Here: {verdict}.**",
        ]
    )


def samples(found: Findings) -> str:
    lines, logs = [], {}
    for name in MAIN:
        for sampler in found.of(name)[0]["samples"]:
            figures = [record["samples"][sampler] for record in found.of(name)]
            lines.append([found.row(name).title, sampler, *_figures(figures)])
            if sampler in ("first-hitting", "one by one"):
                logs[name] = np.log([one["perplexity"] for one in figures])
    order = list(zip(MAIN[1:], MAIN[:-1], strict=True))
    verdicts = [_sampled(logs[more], logs[less], logs) for more, less in order]
    longest = max(record["samples"][LONG]["length_max"] for size in BLOCKS for record in found.of(f"l{size}"))
    reached = HOLDS if longest > found.scale.length else FAILS
    header = ["", "sampler", "generative perplexity", "entropy", "repeated 4-grams", "distinct pairs", "NFE a token"]
    published = ", ".join(f"{found.row(name).title} {value}" for name, value in paper.GENERATIVE.items())
    return "\n\n".join(
        [
            table([*header, "length: median, longest", "ended by"], lines),
            f"Nucleus 0.9, judged by a model trained here ({found.row('judge').title}); perplexities and entropies are "
            f"of {found.scale.unit}s. AR's texts begin after the end of a document.",
            f"The paper: generative perplexity grows from AR over L'=4, 8, 16 to MDLM ({published}; GPT-2 large). "
            f"**Here: {together(verdicts)}** (step by step: {', '.join(verdicts)}).",
            f"The paper: blocks write beyond the length of training (up to {paper.LONGEST} tokens, a model of fixed "
            f"length {paper.LONGEST_OF_FIXED}). **Here: {reached}**: the longest text has {longest} tokens, asked for "
            f"at most {8 * found.scale.length}, where training had {found.scale.length}.",
        ]
    )


def _figures(figures: list[dict[str, Any]]) -> list[str]:
    """Means over seeds."""

    def mean(key: str) -> float:
        return float(np.mean([one[key] for one in figures]))

    perplexities = [one["perplexity"] for one in figures]
    ends: dict[str, int] = {}
    for one in figures:
        for end, count in one["stopped_by"].items():
            ends[end] = ends.get(end, 0) + count
    return [
        f"{math.exp(float(np.mean(np.log(perplexities)))):.2f} ({', '.join(f'{p:.2f}' for p in perplexities)})",
        f"{mean('entropy'):.2f}",
        f"{mean('repetition'):.1%}",
        f"{mean('distinct_2'):.3f}",
        f"{mean('nfe_per_token'):.2f}",
        f"{mean('length_median'):g}, {max(one['length_max'] for one in figures)}",
        ", ".join(f"{end} {count}" for end, count in sorted(ends.items())),
    ]


def _sampled(more: Any, less: Any, logs: dict[str, Any]) -> str:
    """On the claim that the first has the larger perplexity, by the spread over seeds, pooled over the rows."""
    freedom = sum(len(values) - 1 for values in logs.values())
    if not freedom:
        return UNDECIDED
    squares = sum(float(np.square(values - values.mean()).sum()) for values in logs.values())
    seeds = Seeds(math.sqrt(squares / freedom), freedom)
    margin = seeds.quantile * seeds.error(len(more), len(less))
    return Difference(float(more.mean() - less.mean()), margin).verdict()


def efficiency(found: Findings, record: dict[str, Any]) -> str:
    lines, parts = [], []
    for size in record["sizes"]:
        passes, attention = size["passes"], size["attention"]
        shape = f"{size['batch']} × {size['length']} tokens, hidden {size['hidden']}"
        gain = passes["two passes"] / passes["one pass"] - 1
        lines.append([shape, f"{passes['one pass']:.1f}", f"{passes['two passes']:.1f}", f"{gain:+.1%}"])
        own = {name: ms for name, ms in attention.items() if name != "dense mask"}
        kernels = ", ".join(f"{name} {ms:.1f} ms ({attention['dense mask'] / ms:.1f}×)" for name, ms in own.items())
        parts.append(f"Attention, {shape}: dense mask {attention['dense mask']:.1f} ms, {kernels}.")
    gains = [size["passes"]["two passes"] / size["passes"]["one pass"] for size in record["sizes"]]
    # Medians of a shared machine: a tenth is not told apart.
    verdict = HOLDS if min(gains) > 1.1 else FAILS if max(gains) < 1.1 else UNDECIDED
    return "\n\n".join(
        [
            table(["forward and backward, milliseconds", "one pass", "two passes", "gain"], lines),
            f"The paper: one vectorised pass over noisy and clean rows trains {paper.VECTORISED_GAIN} faster than two. "
            f"**Here, on {record['device']}: {verdict}.**",
            *parts,
            f"The paper: FlexAttention is {paper.FLEX_GAIN} faster than a dense mask, on a GPU. Here `cpu` leaves out "
            "the chunks of the mask that nobody sees"
            + ("." if record["device"] == "cpu" else "; `triton` is the fused kernel."),
        ]
    )
