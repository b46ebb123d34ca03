"""Write sections 3 and 4: intervals of mask rates, and where a loss's variance comes from."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bd3_scale.diffusion.interval import FULL, Interval
from reproduction import paper
from reproduction.findings import HELD_OUT, Findings, table
from reproduction.rows import BLOCKS, INTERVALS
from reproduction.statistics import FAILS, HOLDS, UNDECIDED, together

Variances = dict[Interval, tuple[float, float]]


def clipped_sizes(findings: Findings) -> tuple[int, ...]:
    """Return the block sizes that are trained with fixed intervals."""
    return (*findings.scale.clipped, findings.scale.length)


def clipped_name(size: int, interval: tuple[float, float]) -> str:
    """Return the name of the row with a fixed interval."""
    return f"l{size}-{interval[0]}-{interval[1]}"


def loss_variance(findings: Findings, size: int, interval: tuple[float, float]) -> float:
    """Return the variance of a block's loss under the interval that its model was trained with, on held-out text."""
    text = findings.of(clipped_name(size, interval))[0]["texts"][f"{HELD_OUT}, L'={size}"]
    return next(each["variance"] for each in text["intervals"] if (each["low"], each["high"]) == interval)


def clipped(findings: Findings) -> str:
    """Write section 3."""
    parts, lines, narrower, best = [], [], [], []
    for size in clipped_sizes(findings):
        for interval in INTERVALS:
            published = paper.CLIPPED.get(size, {}).get(interval)
            name = clipped_name(size, interval)
            figures = [f"{published[0]} / {published[1]}"] if published else [""]
            variance = f"{loss_variance(findings, size, interval):.4f}"
            lines.append([findings.row(name).title, *findings.cells(findings.measured(name)), variance, *figures])
        least = min(INTERVALS, key=lambda interval: loss_variance(findings, size, interval))
        full = findings.compare(clipped_name(size, FULL), clipped_name(size, least))
        narrower.append(FAILS if least == FULL else full.verdict())
        other = min((i for i in INTERVALS if i != least), key=lambda i: findings.measured(clipped_name(size, i)).mean)
        ahead = findings.compare(clipped_name(size, other), clipped_name(size, least))
        best.append(ahead.verdict())
        parts.append(
            f"L'={size}: U{_named(*least)} has the least variance. Nats a {findings.scale.unit} that others cost more: "
            f"U[0, 1] {full} ({narrower[-1]}), the best of the others, U{_named(*other)}, {ahead} ({best[-1]})."
        )
    others = ", with the spread over seeds of other rows" if findings.seeds().freedom else ""
    return "\n\n".join(
        [
            table([*findings.header, "variance of a block's loss", "paper: perplexity / variance"], lines),
            f"Half of section 1's tokens, one seed{others}. Of an interval that begins at 0 the true variance is "
            "infinite: the figure is that of the rates drawn, and grows with their number.",
            "The paper: at every L' an interval narrower than [0, 1] has less variance, and the model that trains with "
            f"the one of least variance is better than with [0, 1]. **Here: {together(narrower)}.**",
            f"The paper: and it is the best of all (at each L' of its table 2). **Here: {together(best)}.**",
            *parts,
            *(_by_rate(findings) if FAILS in best else []),
        ]
    )


def _by_rate(findings: Findings) -> list[str]:
    """Write where the model of least variance is worse: at mask rates that it was not trained on, or at all."""
    lines, costs, behind, seeds = [], [], [], findings.seeds()
    for size in clipped_sizes(findings):
        names = {interval: clipped_name(size, interval) for interval in INTERVALS}
        lines += [[findings.row(n).title, *(f"{x:.3f}" for x in _halves(findings, n)[0])] for n in names.values()]
        calm = names[min(INTERVALS, key=lambda interval: loss_variance(findings, size, interval))]
        (ours, our_errors), (best, best_errors) = (_halves(findings, n) for n in (calm, best_clipped(findings, size)))
        errors = np.sqrt(np.square(our_errors) + np.square(best_errors) + seeds.error(1, 1) ** 2)
        light, heavy = (f"{x:+.3f} ± {seeds.quantile * e:.3f}" for x, e in zip(ours - best, errors, strict=True))
        costs.append(f"L'={size} {light} and {heavy}")
        behind += [f"L'={size}"] if (ours - best)[1] > seeds.quantile * errors[1] else []
    also = f" It is behind at heavy masks, too, at {', '.join(behind)}: there it does not only want for practice."
    return [
        "Looked into: whether the model of least variance is only behind at mask rates that it does not train with. "
        f"Loss on held-out text at light and at heavy masks, nats a {findings.scale.unit}:",
        table(["", "at rates [0, 0.5]", "at rates [0.5, 1]"], lines),
        f"The model of least variance minus the best one, at light and at heavy masks: {'; '.join(costs)}."
        f"{also if behind else ''} Section 1's rows follow the search: another interval may serve them better.",
    ]


def _halves(findings: Findings, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean loss at mask rates below and above 0.5, and their standard errors over blocks."""
    blocks, losses, squares = tenths(findings, name).T
    means = losses / blocks
    errors = ((squares / blocks - means**2) / blocks).reshape(2, 5).sum(1)
    return means.reshape(2, 5).mean(1), np.sqrt(errors) / 5


def search_results(record: dict[str, Any], size: int) -> list[tuple[int, float, float]]:
    """Return step, β and ω of every search of a training."""
    keys = [f"mask_rate_{end}_block_{size}" for end in ("low", "high")]
    return [(search["step"], search[keys[0]], search[keys[1]]) for search in record["training"]["searches"]]


def searched_rows(findings: Findings) -> dict[int, str]:
    """Return the rows whose interval is searched, by block size."""
    sizes = {**{size: f"l{size}" for size in BLOCKS}, findings.scale.length: "mdlm"}
    return sizes | ({findings.scale.longer * findings.scale.length: "mdlm-longer"} if findings.scale.longer > 1 else {})


def searched(findings: Findings) -> str:
    """Write section 4."""
    lines = []
    for size, name in searched_rows(findings).items():
        records = findings.of(name)
        lines.append(
            [
                f"{findings.row(name).title}",
                ", ".join(
                    _named(low, high) for _, low, high in (search_results(record, size)[-1] for record in records)
                ),
                _named(*least_variance(variances(findings, name))),
                _course(records, f"loss_variance_block_{size}"),
                _course(records, f"loss_variance_unclipped_block_{size}"),
                _named(*paper.SEARCHED[size]) if size in paper.SEARCHED else "",
            ]
        )
    names = [name for name in searched_rows(findings).values() if name != "mdlm-longer"]
    return "\n\n".join(
        [
            table(
                [
                    "",
                    "trained with at the end, by seed",
                    "least variance at the end",
                    "variance of the former, first and last search",
                    "of [0, 1]",
                    "paper",
                ],
                lines,
            ),
            "Training leaves an interval only for one that is clearly better on the text of its evaluations; the least "
            "variance at the end is by all of the held-out text, its mean over seeds.",
            "The paper: the smaller the blocks, the heavier the masking of least variance. **Here: "
            f"{order_of_intervals([variances(findings, name) for name in names])}** with sequences of "
            f"{findings.scale.length} {findings.scale.unit}s. From one block size to the next larger one the interval "
            "counts as another where its variance is below that of the former, by both their errors.",
            *_look(findings),
            *([_longer(findings)] if findings.scale.longer > 1 else []),
        ]
    )


def variances(findings: Findings, name: str) -> Variances:
    """Return the variance of a block's loss by interval on all held-out text: mean over seeds, and standard error."""
    texts = [r["texts"][f"{HELD_OUT}, L'={findings.row(name).block_sizes[0]}"]["intervals"] for r in findings.of(name)]
    by_seed = [{(x["low"], x["high"]): (x["variance"], x["standard_error"]) for x in text} for text in texts]
    common = [interval for interval in by_seed[0] if all(interval in each for each in by_seed)]
    seeds = {interval: np.array([each[interval] for each in by_seed]) for interval in common}
    return {i: (float(x[:, 0].mean()), float(np.sqrt(np.square(x[:, 1]).sum()) / len(x))) for i, x in seeds.items()}


def least_variance(variances: Variances) -> Interval:
    """Return the interval of least variance."""
    return min(variances, key=lambda interval: variances[interval][0])


def _gain(shorter: Variances, longer: Variances) -> tuple[float, float]:
    """Return how much less variance longer blocks have under their best interval than under that of shorter blocks.

    The second value is half of its 95% interval.
    """
    ends = [longer.get(least_variance(each), (math.nan, math.nan)) for each in (shorter, longer)]
    return ends[0][0] - ends[1][0], 1.96 * math.hypot(ends[0][1], ends[1][1])


def order_of_intervals(rows: list[Variances]) -> str:
    """Return the verdict on the claim that larger blocks have lighter masks of least variance; rows by block size."""
    moves = []
    for shorter, longer in itertools.pairwise(rows):
        gain, margin = _gain(shorter, longer)
        if gain > margin:
            moves.append(sum(least_variance(longer)) < sum(least_variance(shorter)))
    return UNDECIDED if not moves else HOLDS if all(moves) else FAILS


def _named(low: float, high: float) -> str:
    return f"[{low:g}, {high:g}]"


def _course(records: list[dict[str, Any]], key: str) -> str:
    """Return the means over seeds at the first and at the last search."""
    ends = [[record["training"]["searches"][index][key] for record in records] for index in (0, -1)]
    return " → ".join(f"{float(np.mean(values)):.3f}" for values in ends)


def tenths(findings: Findings, name: str) -> NDArray[np.float64]:
    """Return [tenths of mask rates, (blocks, sum of losses, sum of squares)] of a row on held-out text."""
    text = findings.of(name)[0]["texts"][f"{HELD_OUT}, L'={findings.row(name).block_sizes[0]}"]
    return np.array(text["rates"])


def best_clipped(findings: Findings, size: int) -> str:
    """Return the row of section 3 with the lowest NELBO."""
    return min((clipped_name(size, interval) for interval in INTERVALS), key=lambda name: findings.measured(name).mean)


def parts_of_variance(rates: NDArray[np.float64], interval: Interval) -> tuple[float, float]:
    """Split the variance of a block's loss over an interval of mask rates (law of total variance).

    Returns the mean of the variance at a rate, and the variance of the mean from rate to rate.
    """
    low, high = (round(10 * end) for end in interval)
    blocks, losses, squares = rates[low:high].T
    means = losses / blocks
    return float((squares / blocks - means**2).mean()), float(means.var())


def expected(rates: NDArray[np.float64], times: int) -> Interval:
    """Predict the interval of least variance for blocks `times` as long, if the part at a rate falls as 1/times."""
    ends = [(low / 10, high / 10) for low, high in itertools.combinations(range(11), 2) if high - low >= 5]
    parts = {interval: parts_of_variance(rates, interval) for interval in ends}
    return min(parts, key=lambda interval: parts[interval][0] / times + parts[interval][1])


def _look(findings: Findings) -> list[str]:
    """Write why the search chooses the intervals that it does."""
    longer = ["mdlm-longer"] if findings.scale.longer > 1 else []
    lines = []
    for name in [*(best_clipped(findings, size) for size in clipped_sizes(findings)), *longer]:
        for interval in ((0.0, 0.5), (0.5, 1.0)):
            at, between = parts_of_variance(tenths(findings, name), interval)
            figures = (f"{x:.3f}" for x in (at, between, at + between))
            lines.append([findings.row(name).title, _named(*interval), *figures])
    return [
        "Looked into: a block's loss varies at one mask rate, with the tokens that are masked and with the text, and "
        "its mean varies from rate to rate. On held-out text, by section 3's best model of each L'"
        f"{' and the row of longer sequences' if longer else ''}:",
        table(["model", "mask rates", "variance at a rate", "of means from rate to rate", "sum"], lines),
        "Were tokens independent, the first part would fall as blocks grow, as 1/L', and the second one would not: the "
        "longer the blocks, the more the second decides.",
    ]


def _longer(findings: Findings) -> str:
    times, row, length = findings.scale.longer, findings.row("mdlm-longer"), findings.scale.length
    expects = {i: expected(tenths(findings, clipped_name(length, i)), times) for i in INTERVALS}
    said = ", ".join(f"on {_named(*own)} {_named(*other)}" for own, other in expects.items())
    shorter, longer = variances(findings, "mdlm"), variances(findings, row.name)
    least, before = least_variance(longer), least_variance(shorter)
    lighter = sum(sum(interval) < sum(before) for interval in expects.values())
    gain, margin = _gain(shorter, longer)
    _, *trained = search_results(findings.of(row.name)[0], row.block_sizes[0])[-1]
    rows = [variances(findings, name) for name in searched_rows(findings).values()]
    return (
        f"If blocks {times} times as long had {times} times less of the first part, the least variance would be, by "
        f"section 3's models of L'={length} as they trained, {said}: {lighter} of {len(expects)} expect lighter masks "
        f"than {_named(*before)}. Measured, with {row.title}, one seed, in training at {_named(*trained)}: "
        f"{_named(*least)}, with {gain:.3f} ± {margin:.3f} less variance than {_named(*before)}. With this row the "
        f"paper's order: **{order_of_intervals(rows)}**."
    )
