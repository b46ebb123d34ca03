"""Sections 3 and 4: intervals of mask rates, and where a loss's variance comes from."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bd3_scale.diffusion.interval import FULL, Interval
from tools.reproduction import paper
from tools.reproduction.findings import HELD_OUT, Findings, table
from tools.reproduction.rows import BLOCKS, INTERVALS
from tools.reproduction.statistics import FAILS, HOLDS, UNDECIDED, together


def clipped_sizes(found: Findings) -> tuple[int, ...]:
    return (*found.scale.clipped, found.scale.length)


def clipped_name(size: int, interval: tuple[float, float]) -> str:
    return f"l{size}-{interval[0]}-{interval[1]}"


def loss_variance(found: Findings, size: int, interval: tuple[float, float]) -> float:
    """Of a block's loss under the interval that the model was trained with, on held-out text."""
    text = found.of(clipped_name(size, interval))[0]["texts"][f"{HELD_OUT}, L'={size}"]
    return next(one["variance"] for one in text["intervals"] if (one["low"], one["high"]) == interval)


def clipped(found: Findings) -> str:
    parts, lines, narrower, best = [], [], [], []
    for size in clipped_sizes(found):
        for interval in INTERVALS:
            published = paper.CLIPPED.get(size, {}).get(interval)
            name = clipped_name(size, interval)
            figures = [f"{published[0]} / {published[1]}"] if published else [""]
            variance = f"{loss_variance(found, size, interval):.4f}"
            lines.append([found.row(name).title, *found.cells(found.measured(name)), variance, *figures])
        least = min(INTERVALS, key=lambda interval: loss_variance(found, size, interval))
        full = found.compare(clipped_name(size, FULL), clipped_name(size, least))
        narrower.append(FAILS if least == FULL else full.verdict())
        other = min((i for i in INTERVALS if i != least), key=lambda i: found.measured(clipped_name(size, i)).mean)
        ahead = found.compare(clipped_name(size, other), clipped_name(size, least))
        best.append(ahead.verdict())
        parts.append(
            f"L'={size}: U{_named(*least)} has the least variance. Nats a {found.scale.unit} that others cost more: "
            f"U[0, 1] {full} ({narrower[-1]}), the best of the others, U{_named(*other)}, {ahead} ({best[-1]})."
        )
    return "\n\n".join(
        [
            table([*found.header, "variance of a block's loss", "paper: perplexity / variance"], lines),
            "Half of section 1's tokens, one seed, with the spread over seeds of the other rows. Of an interval that "
            "begins at 0 the true variance is infinite: the figure is that of the rates drawn, and grows with their "
            "number.",
            "The paper: at every L' an interval narrower than [0, 1] has less variance, and the model that trains with "
            f"the one of least variance is better than with [0, 1]. **Here: {together(narrower)}.**",
            f"The paper: and it is the best of all (at each L' of its table 2). **Here: {together(best)}.**",
            *parts,
            *(_by_rate(found) if FAILS in best else []),
        ]
    )


def _by_rate(found: Findings) -> list[str]:
    """Where the model of least variance falls behind: at the mask rates that it has not seen, or at all of them."""
    lines, costs, behind, seeds = [], [], [], found.seeds()
    margin = seeds.quantile * seeds.error(1, 1)
    for size in clipped_sizes(found):
        names = {interval: clipped_name(size, interval) for interval in INTERVALS}
        lines += [[found.row(name).title, *(f"{x:.3f}" for x in _halves(found, name))] for name in names.values()]
        calm = names[min(INTERVALS, key=lambda interval: loss_variance(found, size, interval))]
        light, heavy = _halves(found, calm) - _halves(found, best_clipped(found, size))
        costs.append(f"L'={size} {light:+.3f} and {heavy:+.3f}")
        behind += [f"L'={size}"] if heavy > margin else []
    also = (
        f" By more than the spread over seeds ({margin:.3f}) it is behind at heavy masks, too, at {', '.join(behind)}: "
        "there it does not only want for practice."
    )
    return [
        "Looked into: whether the model of least variance is only behind at mask rates that it does not train with. "
        f"Loss on held-out text at light and at heavy masks, nats a {found.scale.unit}:",
        table(["", "at rates [0, 0.5]", "at rates [0.5, 1]"], lines),
        "The model of least variance costs more than the best one, at light and at heavy masks: "
        f"{', '.join(costs)}.{also if behind else ''} Section 1's rows follow the search: another interval may serve "
        "them better.",
    ]


def _halves(found: Findings, name: str) -> NDArray[np.float64]:
    blocks, losses, _ = tenths(found, name).T
    halves: NDArray[np.float64] = (losses / blocks).reshape(2, 5).mean(1)
    return halves


def chosen(record: dict[str, Any], size: int) -> list[tuple[int, float, float]]:
    """What training followed: step, β, ω of every search."""
    keys = [f"mask_rate_{end}_block_{size}" for end in ("low", "high")]
    return [(one["step"], one[keys[0]], one[keys[1]]) for one in record["training"]["searches"]]


def searched_rows(found: Findings) -> dict[int, str]:
    """Those whose interval is searched, by block size."""
    longer = {found.row("mdlm-longer").block_sizes[0]: "mdlm-longer"} if found.scale.longer else {}
    return {**{size: f"l{size}" for size in BLOCKS}, found.scale.length: "mdlm", **longer}


def searched(found: Findings) -> str:
    lines, middles = [], {}
    for size, name in searched_rows(found).items():
        records = found.of(name)
        least = [least_variance(record, size) for record in records]
        middles[name] = float(np.mean([sum(interval) / 2 for interval in least]))
        lines.append(
            [
                f"{found.row(name).title}",
                ", ".join(_named(low, high) for _, low, high in (chosen(record, size)[-1] for record in records)),
                ", ".join(_named(*interval) for interval in least),
                _course(records, f"loss_variance_block_{size}"),
                _course(records, f"loss_variance_unclipped_block_{size}"),
                _named(*paper.SEARCHED[size]) if size in paper.SEARCHED else "",
            ]
        )
    longest = middles.pop("mdlm-longer", None)
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
            "variance at the end is by all of the held-out text.",
            "The paper: the smaller the blocks, the heavier the masking that the search chooses. **Here: "
            f"{_falling(list(middles.values()))}** with sequences of {found.scale.length} {found.scale.unit}s.",
            *_look(found),
            *([] if longest is None else [_longer(found, [*middles.values(), longest])]),
        ]
    )


def least_variance(record: dict[str, Any], size: int) -> Interval:
    """By all of the held-out text that is measured."""
    text = record["texts"][f"{HELD_OUT}, L'={size}"]
    best = min(text["intervals"], key=lambda one: one["variance"])
    return best["low"], best["high"]


def _named(low: float, high: float) -> str:
    return f"[{low:g}, {high:g}]"


def _course(records: list[dict[str, Any]], key: str) -> str:
    """Means over seeds at the first search and at the last."""
    ends = [[record["training"]["searches"][place][key] for record in records] for place in (0, -1)]
    return " → ".join(f"{float(np.mean(values)):.3f}" for values in ends)


def _falling(middles: list[float]) -> str:
    """On the claim that the interval's middle falls as blocks grow."""
    if len(set(middles)) == 1:
        return UNDECIDED
    return HOLDS if all(later <= earlier for earlier, later in itertools.pairwise(middles)) else FAILS


def tenths(found: Findings, name: str) -> NDArray[np.float64]:
    """[tenths of mask rates, (blocks, sum of losses, sum of squares)] of a row on held-out text."""
    text = found.of(name)[0]["texts"][f"{HELD_OUT}, L'={found.row(name).block_sizes[0]}"]
    return np.array(text["rates"])


def best_clipped(found: Findings, size: int) -> str:
    """The row of section 3 with the lowest NELBO."""
    return min((clipped_name(size, interval) for interval in INTERVALS), key=lambda name: found.measured(name).mean)


def parts_of_variance(rates: NDArray[np.float64], interval: Interval) -> tuple[float, float]:
    """Of a block's loss under rates of an interval of tenths: the mean variance at a rate, and the variance of its mean
    from rate to rate.
    """
    low, high = (round(10 * end) for end in interval)
    blocks, losses, squares = rates[low:high].T
    means = losses / blocks
    return float((squares / blocks - means**2).mean()), float(means.var())


def expected(rates: NDArray[np.float64], times: int) -> Interval:
    """The interval of least variance of blocks so many times as long, if the part at a rate falls as they grow."""
    ends = [(low / 10, high / 10) for low, high in itertools.combinations(range(11), 2) if high - low >= 5]
    parts = {interval: parts_of_variance(rates, interval) for interval in ends}
    return min(parts, key=lambda interval: parts[interval][0] / times + parts[interval][1])


def _look(found: Findings) -> list[str]:
    """Why the search chooses what it does."""
    longer = ["mdlm-longer"] if found.scale.longer else []
    lines = []
    for name in [*(best_clipped(found, size) for size in clipped_sizes(found)), *longer]:
        for interval in ((0.0, 0.5), (0.5, 1.0)):
            at, between = parts_of_variance(tenths(found, name), interval)
            lines.append([found.row(name).title, _named(*interval), *(f"{x:.3f}" for x in (at, between, at + between))])
    return [
        "Looked into: a block's loss varies at one mask rate, with the tokens that are masked and with the text, and "
        "its mean varies from rate to rate. On held-out text, by section 3's best model of each L'"
        f"{' and the row of longer sequences' if longer else ''}:",
        table(["model", "mask rates", "variance at a rate", "of means from rate to rate", "sum"], lines),
        "Were tokens independent, the first part would fall as blocks grow, as 1/L', and the second one would not: the "
        "longer the blocks, the more the second decides.",
    ]


def _longer(found: Findings, middles: list[float]) -> str:
    times, row, length = found.scale.longer or 1, found.row("mdlm-longer"), found.scale.length
    [record] = found.of(row.name)
    least = least_variance(record, row.block_sizes[0])
    expects = {i: expected(tenths(found, clipped_name(length, i)), times) for i in INTERVALS}
    best = min(INTERVALS, key=lambda interval: found.measured(clipped_name(length, interval)).mean)
    said = ", ".join(f"{_named(*own)}: {_named(*other)}" for own, other in expects.items())
    trained = chosen(record, row.block_sizes[0])[-1][1:]
    known = {
        (one["low"], one["high"]): one for one in record["texts"][f"{HELD_OUT}, L'={row.block_sizes[0]}"]["intervals"]
    }
    gain = known[trained]["variance"] - known[least]["variance"]
    margin = 1.96 * math.hypot(known[trained]["standard_error"], known[least]["standard_error"])
    verdict = UNDECIDED if gain <= margin else _falling(middles)
    return (
        f"If blocks {times} times as long had {times} times less of the first part, U{_named(*expects[best])} would "
        f"have the least variance by the best model of L'={length} (by all of them, as they trained on {said}). "
        f"Measured, with {row.title}, one seed: U{_named(*least)} has, {gain:.3f} ± {margin:.3f} less than "
        f"U{_named(*trained)}, with which it trained. With this row the paper's order: **{verdict}**."
    )
