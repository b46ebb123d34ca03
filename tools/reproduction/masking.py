"""Sections 3 and 4: intervals of mask rates, and where a loss's variance comes from."""

from __future__ import annotations

import itertools
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


def searched_rows(found: Findings) -> dict[int, str]:
    """Those whose interval is searched, by block size."""
    longer = {found.row("mdlm-longer").block_sizes[0]: "mdlm-longer"} if found.scale.longer else {}
    return {**{size: f"l{size}" for size in BLOCKS}, found.scale.length: "mdlm", **longer}


def searched(found: Findings) -> str:
    lines, middles = [], {}
    for size, name in searched_rows(found).items():
        records = found.of(name)
        ends = [chosen(record, size)[-1] for record in records]
        middles[name] = float(np.mean([(low + high) / 2 for _, low, high in ends]))
        lines.append(
            [
                f"{found.row(name).title}",
                ", ".join(_named(low, high) for _, low, high in ends),
                _course(records, f"loss_variance_block_{size}"),
                _course(records, f"loss_variance_unclipped_block_{size}"),
                _named(*paper.SEARCHED[size]) if size in paper.SEARCHED else "",
            ]
        )
    longest = middles.pop("mdlm-longer", None)
    header = ["", "interval at the end, by seed", "its variance, first and last search", "that of [0, 1]", "paper"]
    return "\n\n".join(
        [
            table(header, lines),
            "The paper: the smaller the blocks, the heavier the masking that the search chooses. **Here: "
            f"{_falling(list(middles.values()))}** with sequences of {found.scale.length} {found.scale.unit}s.",
            *_look(found),
            *([] if longest is None else [_longer(found, [*middles.values(), longest])]),
        ]
    )


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


def tenths(found: Findings, size: int) -> NDArray[np.float64]:
    """[tenths of mask rates, (blocks, sum of losses, sum of squares)] of the model that trained without clipping."""
    text = found.of(clipped_name(size, FULL))[0]["texts"][f"{HELD_OUT}, L'={size}"]
    return np.array(text["rates"])


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
    light, heavy = (0.0, 0.5), (0.5, 1.0)
    lines, parts = [], []
    for size in clipped_sizes(found):
        parts.append([parts_of_variance(tenths(found, size), interval) for interval in (light, heavy)])
        for interval, (at, between) in zip((light, heavy), parts[-1], strict=True):
            lines.append([f"L'={size}", f"U{_named(*interval)}", f"{at:.3f}", f"{between:.3f}", f"{at + between:.3f}"])
    (light_at, light_between), (heavy_at, heavy_between) = np.array(parts).transpose(1, 2, 0)
    first = HOLDS if (light_at > heavy_at).all() else FAILS
    falls = HOLDS if (np.diff(light_at) < 0).all() and (np.diff(heavy_at) < 0).all() else FAILS
    second = HOLDS if (heavy_between > light_between).all() else FAILS
    return [
        "Looked into: a block's loss varies at one mask rate, with the tokens that are masked and with the text, and "
        "its mean varies from rate to rate. By models that trained on U[0, 1]:",
        table(["", "mask rates", "variance at a rate", "of means from rate to rate", "sum"], lines),
        f"Light masks make the first part large, since a masked token counts as 1/rate (**{first}** at every L'), and "
        f"it falls as blocks grow (**{falls}**). Heavy masks make the second one large, since context runs out "
        f"(**{second}**). So lighter masks have the less variance where blocks are so long, or context says so much, "
        "that the second part outweighs the first.",
    ]


def _longer(found: Findings, middles: list[float]) -> str:
    times, row = found.scale.longer or 1, found.row("mdlm-longer")
    expects = expected(tenths(found, found.scale.length), times)
    _, low, high = chosen(found.of(row.name)[0], row.block_sizes[0])[-1]
    return (
        f"With blocks {times} times as long as MDLM's above, the first part would be {times} times smaller, and "
        f"U{_named(*expects)} the interval of least variance. {row.title} chose {_named(low, high)} at the end. With "
        f"it the paper's order **{_falling(middles)}**."
    )
