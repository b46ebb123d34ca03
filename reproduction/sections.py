"""Write sections 7 and 8: samples and efficiency."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from reproduction import paper
from reproduction.findings import MAIN, Findings, table
from reproduction.rows import BLOCKS, LONG
from reproduction.statistics import FAILS, HOLDS, UNDECIDED, Difference, Seeds, together


def samples(findings: Findings) -> str:
    """Write section 7."""
    lines, logs = [], {}
    for name in MAIN:
        for sampler in findings.of(name)[0]["samples"]:
            figures = [record["samples"][sampler] for record in findings.of(name)]
            lines.append([findings.row(name).title, sampler, *_figures(figures)])
            if sampler in ("first-hitting", "one by one"):
                logs[name] = np.log([figure["perplexity"] for figure in figures])
    order = list(zip(MAIN[1:], MAIN[:-1], strict=True))
    verdicts = [_sampled(logs[more], logs[less], logs) for more, less in order]
    longest = max(record["samples"][LONG]["length_max"] for size in BLOCKS for record in findings.of(f"l{size}"))
    reached = HOLDS if longest > findings.scale.length else FAILS
    header = [
        "",
        "sampler",
        "generative perplexity",
        "entropy",
        "repeated 4-grams",
        "distinct pairs",
        "passes a token (NFE)",
    ]
    published = ", ".join(f"{findings.row(name).title} {value}" for name, value in paper.GENERATIVE.items())
    return "\n\n".join(
        [
            table([*header, "length: median, longest", "ended by"], lines),
            f"Nucleus 0.9, judged by a model trained here ({findings.row('judge').title}); perplexities and entropies "
            f"are of {findings.scale.unit}s. AR's texts begin after the end of a document. A low "
            "perplexity beside many repeated 4-grams is that of repetition.",
            f"The paper: generative perplexity grows from AR over L'=4, 8, 16 to MDLM ({published}; GPT-2 large). "
            f"**Here: {together(verdicts)}** (step by step: {', '.join(verdicts)}).",
            f"The paper: blocks write beyond the length of training (up to {paper.LONGEST} tokens, a model of fixed "
            f"length {paper.LONGEST_OF_FIXED}). **Here: {reached}**: the longest text has {longest} tokens, asked for "
            f"at most {8 * findings.scale.length}, where training had {findings.scale.length}.",
        ]
    )


def _figures(figures: list[dict[str, Any]]) -> list[str]:
    """Return the cells of a sampler: means over seeds."""

    def mean(key: str) -> float:
        return float(np.mean([figure[key] for figure in figures]))

    perplexities = [figure["perplexity"] for figure in figures]
    ends: dict[str, int] = {}
    for figure in figures:
        for end, count in figure["stopped_by"].items():
            ends[end] = ends.get(end, 0) + count
    return [
        f"{math.exp(float(np.mean(np.log(perplexities)))):.2f} ({', '.join(f'{p:.2f}' for p in perplexities)})",
        f"{mean('entropy'):.2f}",
        f"{mean('repetition'):.1%}",
        f"{mean('distinct_2'):.3f}",
        f"{mean('nfe_per_token'):.2f}",
        f"{mean('length_median'):g}, {max(figure['length_max'] for figure in figures)}",
        ", ".join(f"{end}: {count} texts" for end, count in sorted(ends.items())),
    ]


def _sampled(more: Any, less: Any, logs: dict[str, Any]) -> str:
    """Return the verdict that the first perplexity is larger, by the spread over seeds, pooled over rows."""
    freedom = sum(len(values) - 1 for values in logs.values())
    if not freedom:
        return UNDECIDED
    squares = sum(float(np.square(values - values.mean()).sum()) for values in logs.values())
    seeds = Seeds(math.sqrt(squares / freedom), freedom)
    margin = seeds.quantile * seeds.error(len(more), len(less))
    return Difference(float(more.mean() - less.mean()), margin).verdict()


def efficiency(findings: Findings, record: dict[str, Any]) -> str:
    """Write section 8."""
    lines, parts, work, same = [], [], [], True
    for size in record["sizes"]:
        passes, attention = size["passes"], size["attention"]
        shape = f"{size['batch']} × {size['length']} tokens, hidden {size['hidden']}"
        rates = {name: size["gflop"][name] / ms * 1e3 for name, ms in passes.items()}
        gain = passes["two passes"] / passes["one pass"] - 1
        lines.append([shape, f"{passes['one pass']:.1f}", f"{passes['two passes']:.1f}", f"{gain:+.1%}"])
        same = same and abs(size["gflop"]["one pass"] / size["gflop"]["two passes"] - 1) < 0.01
        work.append(
            f"{shape}: {size['gflop']['one pass']:.1f} GFLOP in one pass and {size['gflop']['two passes']:.1f} in two, "
            f"at {rates['one pass']:.0f} and {rates['two passes']:.0f} GFLOP/s"
        )
        own = {name: ms for name, ms in attention.items() if name != "dense mask"}
        kernels = ", ".join(f"{name} {ms:.1f} ms ({attention['dense mask'] / ms:.1f}×)" for name, ms in own.items())
        parts.append(f"Attention, {shape}: dense mask {attention['dense mask']:.1f} ms, {kernels}.")
    gains = [size["passes"]["two passes"] / size["passes"]["one pass"] for size in record["sizes"]]
    verdict = HOLDS if min(gains) > 1.1 else FAILS if max(gains) < 1.1 else UNDECIDED
    return "\n\n".join(
        [
            table(["forward and backward, milliseconds", "one pass", "two passes", "gain"], lines),
            f"The paper: one vectorised pass over noisy and clean rows trains {paper.VECTORISED_GAIN} faster than two. "
            f"**Here, on {record['device']}: {verdict}** (medians of a shared machine: a tenth is not told apart).",
            f"Looked into: {'; '.join(work)}, where one large product reaches {record['product_gflops']:.0f}. "
            f"{'Both do the same work. ' if same else ''}What makes two passes slower where they are was not measured.",
            *parts,
            f"The paper: FlexAttention is {paper.FLEX_GAIN} faster than a dense mask, on a GPU. Here "
            + (
                "`cpu` leaves out the chunks of the mask that nobody sees."
                if record["device"] == "cpu"
                else "`triton` is the fused kernel."
            ),
        ]
    )
