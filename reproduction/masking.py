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
    comparisons, lines, narrower, best = [], [], [], []
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
        first, second = f"{full} ({narrower[-1]})", f"{ahead} ({best[-1]})"
        comparisons.append([f"L'={size}", f"U{_named(*least)}", first, f"U{_named(*other)}", second])
    others = " The 95% intervals use the spread over seeds of other rows." if findings.seeds().freedom else ""
    return "\n\n".join(
        [
            "Each model trains with mask rates from one fixed interval, on half of section 1's tokens, with one seed."
            f"{others} The variance of a block's loss is measured under the model's own interval, on held-out text. If "
            "an interval begins at 0, the true variance is infinite. The figure is then the variance of the rates that "
            "were drawn, and grows with their number.",
            table([*findings.header, "variance of a block's loss", "paper: perplexity / variance"], lines),
            "Paper: at every L', an interval narrower than [0, 1] has a lower variance than [0, 1], and the model that "
            "trains with the interval of lowest variance is better than the model that trains with [0, 1]. "
            f"**Here: {together(narrower)}.**",
            "Paper: the model that trains with the interval of lowest variance is the best of all, at each L' of the "
            f"paper's table 2. **Here: {together(best)}.**",
            "The table compares two other models with the model that trains with the interval of lowest variance: the "
            f"model with [0, 1], and the best of all other models. Differences are in nats per {findings.scale.unit}.",
            table(
                ["block size", "lowest variance", "U[0, 1] costs more", "best other", "best other costs more"],
                comparisons,
            ),
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
        both = (f"{x:+.3f} ± {seeds.quantile * e:.3f}" for x, e in zip(ours - best, errors, strict=True))
        costs.append([f"L'={size}", *both])
        behind += [f"L'={size}"] if (ours - best)[1] > seeds.quantile * errors[1] else []
    also = (
        f"It is also worse at heavy masks at {', '.join(behind)}. There, missing practice at other mask rates is not "
        "the only cause. "
    )
    return [
        "Further analysis: is the model of lowest variance worse only at mask rates with which it does not train? The "
        f"table shows the loss on held-out text at light and at heavy masks, in nats per {findings.scale.unit}:",
        table(["model", "light masks: rates in [0, 0.5]", "heavy masks: rates in [0.5, 1]"], lines),
        "The model of lowest variance minus the best model:",
        table(["block size", "light masks", "heavy masks"], costs),
        f"{also if behind else ''}Section 1's rows use the searched interval. Another interval may suit them better.",
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
                    "model",
                    "training interval at the end, by seed",
                    "interval of lowest variance at the end",
                    "variance under the training interval, first → last search",
                    "variance under [0, 1], first → last search",
                    "paper: interval of lowest variance",
                ],
                lines,
            ),
            "During training, the search replaces an interval only by one that is clearly better on the text of the "
            "training's evaluations. The interval of lowest variance at the end is measured on all of the held-out "
            "text, with the mean over seeds.",
            "Paper: the smaller the blocks, the heavier the masks of the interval of lowest variance. **Here, with "
            f"sequences of {findings.scale.length} {findings.scale.unit}s: "
            f"{order_of_intervals([variances(findings, name) for name in names])}.** The rule compares each block "
            "size with the next larger one. For the larger blocks it takes the variance under two intervals: the "
            "one that is best for them, and the one that is best for the smaller blocks. The best interval counts as "
            "changed if the difference of these variances is larger than half of its 95% interval. "
            "The claim holds if all changes are towards lighter masks. It is undecided if there is no change.",
            *_look(findings),
            *(_longer(findings) if findings.scale.longer > 1 else []),
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
        "Further analysis: the variance of a block's loss has two parts. The first part is the variance at one mask "
        "rate: the loss varies with the choice of the masked tokens and with the text. The second part is the variance "
        "of the mean loss from rate to rate. The table shows both on held-out text, for section 3's best model of each "
        f"L'{' and the model with longer sequences' if longer else ''}:",
        table(["model", "mask rates", "first part: at one rate", "second part: from rate to rate", "sum"], lines),
        "If tokens were independent, the first part would fall as 1/L' and the second part would not fall. The longer "
        "the blocks, the more the second part decides.",
    ]


def _longer(findings: Findings) -> list[str]:
    """Write what longer blocks are predicted to have as their interval of lowest variance, and what was measured."""
    times, row, length = findings.scale.longer, findings.row("mdlm-longer"), findings.scale.length
    expects = {i: expected(tenths(findings, clipped_name(length, i)), times) for i in INTERVALS}
    predictions = [[f"U{_named(*trained)}", _named(*predicted)] for trained, predicted in expects.items()]
    shorter, longer = variances(findings, "mdlm"), variances(findings, row.name)
    least, before = least_variance(longer), least_variance(shorter)
    lighter = sum(sum(interval) < sum(before) for interval in expects.values())
    gain, margin = _gain(shorter, longer)
    _, *trained = search_results(findings.of(row.name)[0], row.block_sizes[0])[-1]
    rows = [variances(findings, name) for name in searched_rows(findings).values()]
    return [
        f"Prediction for blocks {times} times as long: if their first part is {times} times smaller, which interval "
        f"has the lowest variance? Section 3's models of L'={length} predict:",
        table([f"model of L'={length}, trained with", "predicted interval of lowest variance"], predictions),
        f"{lighter} of {len(expects)} models predict lighter masks than {_named(*before)}. Measurement with "
        f"{row.title} (one seed, training interval at the end {_named(*trained)}): {_named(*least)} has the lowest "
        f"variance. It is {gain:.3f} ± {margin:.3f} lower than under {_named(*before)}. The paper's claim on the order "
        f"of intervals, with this row included: **{order_of_intervals(rows)}**.",
    ]
