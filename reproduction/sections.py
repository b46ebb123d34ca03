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
        "model",
        "sampler",
        "generative perplexity: mean (each seed)",
        "entropy",
        "repeated 4-grams",
        "distinct 2-grams",
        "passes per token (NFE)",
        "length: median, longest",
        "stop reason: texts",
    ]
    published = "; ".join(f"{findings.row(name).title}: {value}" for name, value in paper.GENERATIVE.items())
    return "\n\n".join(
        [
            "All samplers use nucleus sampling with p = 0.9. The judge, a model trained here "
            f"({findings.row('judge').title}), measures the generative perplexity. Perplexities and entropies are of "
            f'{findings.scale.unit}s. The texts of AR begin after the end of a document. Samplers with "8 L" write '
            "texts of up to 8 times the training length L. If many 4-grams are repeated, a low perplexity comes from "
            "the repetition.",
            table(header, lines),
            "Paper: generative perplexity increases in the order AR, L'=4, 8, 16, MDLM. Figures under GPT-2 large: "
            f"{published}. **Here: {together(verdicts)}.** The steps of this order: {', '.join(verdicts)}.",
            "Paper: block diffusion writes texts that are longer than its training sequences, of up to "
            f"{paper.LONGEST} tokens. A model of fixed length reaches {paper.LONGEST_OF_FIXED}. **Here: {reached}.** "
            f"The longest text has {longest} tokens. The limit was {8 * findings.scale.length}, and training sequences "
            f"had {findings.scale.length}.",
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
        ", ".join(f"{end}: {count}" for end, count in sorted(ends.items())),
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
    lines, attentions, work, same = [], [], [], True
    for size in record["sizes"]:
        passes, attention = size["passes"], size["attention"]
        shape = f"{size['batch']} × {size['length']} tokens, hidden {size['hidden']}"
        rates = {name: size["gflop"][name] / ms * 1e3 for name, ms in passes.items()}
        gain = passes["two passes"] / passes["one pass"] - 1
        lines.append([shape, f"{passes['one pass']:.1f}", f"{passes['two passes']:.1f}", f"{gain:+.1%}"])
        same = same and abs(size["gflop"]["one pass"] / size["gflop"]["two passes"] - 1) < 0.01
        gflop = (f"{size['gflop'][name]:.1f}" for name in passes)
        work.append([shape, *gflop, *(f"{rate:.0f}" for rate in rates.values())])
        dense = attention["dense mask"]
        backends = {name: ms for name, ms in attention.items() if name != "dense mask"}
        attentions += [[shape, f"{dense:.1f}", n, f"{ms:.1f}", f"{dense / ms:.1f}×"] for n, ms in backends.items()]
    gains = [size["passes"]["two passes"] / size["passes"]["one pass"] for size in record["sizes"]]
    verdict = HOLDS if min(gains) > 1.1 else FAILS if max(gains) < 1.1 else UNDECIDED
    return "\n\n".join(
        [
            "Times are for forward and backward together, in milliseconds.",
            table(["size", "one pass", "two passes", "gain of one pass"], lines),
            f"Paper: one vectorised pass over noisy and clean tokens trains {paper.VECTORISED_GAIN} faster than two "
            f"passes. **Here, on {record['device']}: {verdict}.** The times are medians on a shared machine, which do "
            "not resolve a difference of a tenth. The claim holds if every gain is above a tenth, and does not hold if "
            "every gain is below.",
            "Further analysis: the work of one and of two passes, and the speed at which it is done. One large matrix "
            f"product reaches {record['product_gflops']:.0f} GFLOP/s.",
            table(
                ["size", "one pass, GFLOP", "two passes, GFLOP", "one pass, GFLOP/s", "two passes, GFLOP/s"],
                work,
            ),
            f"{'Both do the same work. ' if same else ''}If two passes are slower, the cause was not measured.",
            "The time of attention alone, in milliseconds:",
            table(["size", "dense mask", "backend", "time of the backend", "gain of the backend"], attentions),
            f"Paper: FlexAttention is {paper.FLEX_GAIN} faster than a dense mask, on a GPU. "
            + (
                "Here, `cpu` skips the chunks of the mask in which nothing is visible."
                if record["device"] == "cpu"
                else "Here, `triton` is the fused kernel."
            ),
        ]
    )
