"""Write sections 1, 2, 5, 6 and 9: perplexities and their differences."""

from __future__ import annotations

import math

import numpy as np

from reproduction import paper
from reproduction.findings import HELD_OUT, MAIN, Findings, table
from reproduction.rows import BASE_SHARE, BLOCKS
from reproduction.statistics import FAILS, HOLDS, UNDECIDED, Difference, fluctuation, together


def perplexity(findings: Findings) -> str:
    """Write section 1."""
    lines = [
        [findings.row(name).title, *findings.cells(findings.measured(name)), *paper.PERPLEXITY[name]] for name in MAIN
    ]
    pairs = list(zip(MAIN[1:], MAIN[:-1], strict=True))
    differences = [findings.compare(*pair) for pair in pairs]
    verdicts = [difference.verdict() for difference in differences]
    steps = table(
        ["difference", f"nats per {findings.scale.unit}", "verdict"],
        [
            [f"{findings.row(more).title} minus {findings.row(less).title}", difference, verdict]
            for (more, less), difference, verdict in zip(pairs, differences, verdicts, strict=True)
        ],
    )
    return "\n\n".join(
        [
            table([*findings.header, "paper: LM1B perplexity", "paper: OWT perplexity"], lines),
            f"Paper: perplexity increases in the order AR, L'=4, 8, 16, MDLM. **Here: {together(verdicts)}.** The four "
            "steps of this order:",
            steps,
        ]
    )


def block_size_one(findings: Findings) -> str:
    """Write section 2."""
    names = ("ar", "l1-masked", "l1-uniform")
    spread = {
        name: float(np.mean([fluctuation(record["training"]["losses"]) for record in findings.of(name)]))
        for name in names
    }
    lines = [
        [
            findings.row(name).title,
            *findings.cells(findings.measured(name)),
            f"{spread[name]:.5f}",
            paper.BLOCK_SIZE_ONE[name],
        ]
        for name in names
    ]
    gap, closed = findings.compare("l1-uniform", "ar"), findings.compare("l1-masked", "ar")
    between = findings.compare("l1-uniform", "l1-masked")
    steps = len(findings.of("ar")[0]["training"]["losses"]) // 2
    # The variance is half the mean square of successive differences. For normal losses the variance of its logarithm is
    # 3/n with n steps, so the ratio of two has 2 · 3/n (3 and not 2, since successive differences share a loss).
    factor = math.exp(1.96 * math.sqrt(2 * 3 / (steps * len(findings.of("ar")))))
    ratio = spread["l1-uniform"] / spread["l1-masked"]
    variance = HOLDS if ratio > factor else FAILS if ratio < 1 / factor else UNDECIDED
    uniform, masked = paper.BLOCK_SIZE_ONE_VARIANCE
    return "\n\n".join(
        [
            table([*findings.header, "variance of the training loss", "paper: LM1B perplexity"], lines),
            "Paper: L'=1 with uniform mask rates costs more than AR, although both have the same expected loss. "
            f"**Here: {gap.verdict()}.** The difference is {gap} nats per {findings.scale.unit}.",
            "Paper: L'=1 with all tokens masked has the same perplexity as AR. **Here: "
            f"{_equal(closed, between)}.** The rule compares two differences, in nats per {findings.scale.unit}. The "
            f"first is all masked minus AR: {closed}. The second is uniform minus all masked: {between}. The claim "
            "does not hold if the interval of the first difference excludes 0. It holds if all values of this interval "
            "are smaller, in absolute value, than half of the second difference.",
            "Paper: the extra cost of uniform mask rates is due to the variance of the loss "
            f"({uniform} with uniform rates, {masked} with all tokens masked). **Here: {variance}.** The variance of "
            f"the training loss from step to step is {ratio:.2f} times as large with uniform rates as with all tokens "
            f"masked. The 95% interval of this ratio is a factor of {factor:.2f} in both directions.",
        ]
    )


def _equal(closed: Difference, gap: Difference) -> str:
    """Return the verdict on a closed gap: none is seen, and what may be left is less than half of what was closed."""
    if abs(closed.value) > closed.margin:
        return FAILS
    return HOLDS if abs(closed.value) + closed.margin < gap.value / 2 else UNDECIDED


def finetuned(findings: Findings) -> str:
    """Write section 5."""
    sizes = (4, 16)
    lines, sentences = [], []
    steps, optimizer = findings.scale.steps, findings.scale.recipe.optimizer
    base = round(BASE_SHARE * steps)
    decay = optimizer.decay_steps if optimizer.decay_steps is not None else steps // 5
    rate = f"falls from step {steps - decay} on" if optimizer.schedule == "wsd" else f"schedule is {optimizer.schedule}"
    for size in sizes:
        for name in (f"l{size}", f"l{size}-finetuned"):
            lines.append([findings.row(name).title, *findings.cells(findings.measured(name))])
        difference = findings.compare(f"l{size}-finetuned", f"l{size}")
        sentences.append(
            f"Authors: for L'={size}, training from scratch is better than training from the base. **Here: "
            f"{difference.verdict()}.** Base minus scratch: {difference} nats per {findings.scale.unit}."
        )
    return "\n\n".join(
        [
            table(findings.header, lines),
            "The paper trains a base at L'=L for 85% of the steps, because this is faster. It gives no figures for "
            "training from scratch. Its authors say what they expect in issue 39 of their repository.",
            *sentences,
            f"The base is trained in steps 1 to {base} of {steps}. The learning rate {rate}. The steps after "
            "the base are few and use this learning rate. How much of the difference this causes was not measured "
            "separately.",
        ]
    )


def zero_shot(findings: Findings) -> str:
    """Write section 6, perplexities of other texts; claims are about the two texts that the paper has, too."""
    lines = []
    for name in MAIN:
        cells = [f"{math.exp(findings.measured(name, text).mean):.3f}" for text in findings.texts]
        lines.append([findings.row(name).title, *cells, *paper.ZERO_SHOT.get(name, ("", ""))])
    parts = [
        f"Perplexities here are per {findings.scale.unit}.",
        table(["model", *findings.texts, "paper: PTB perplexity", "paper: WikiText perplexity"], lines),
    ]
    claims = {
        "wikitext2": (("l4", "ar", True), ("l4", "mdlm", False)),
        "ptb": (("l4", "ar", True), ("l4", "mdlm", True)),
    }
    verdicts = []
    for text in findings.texts:
        for first, second, more in claims.get(text, ()):
            difference = findings.compare(first, second, text)
            claim = f"{findings.row(first).title} costs {'more' if more else 'less'} than {findings.row(second).title}"
            verdicts.append([text, claim, difference, f"**{difference.verdict(more)}**"])
    if verdicts:
        parts.append(
            table(
                ["text", "the paper's claim", f"first minus second, nats per {findings.scale.unit}", "verdict"],
                verdicts,
            )
        )
    return "\n\n".join([*parts, *_advantage(findings)])


def _advantage(findings: Findings) -> list[str]:
    """Write how much better blocks of 4 are than MDLM on each text, and how much of it is lost on other text."""
    own = findings.compare("mdlm", "l4")
    lines, shrunk = [["held-out", own, "", f"{paper.ADVANTAGE[HELD_OUT]:+.3f}"]], []
    for text in findings.texts:
        there = findings.compare("mdlm", "l4", text)
        lost = Difference(own.value - there.value, math.hypot(own.margin, there.margin))
        published = f"{paper.ADVANTAGE[text]:+.3f}" if text in paper.ADVANTAGE else ""
        lines.append([text, there, lost, published])
        if text in paper.ADVANTAGE:
            shrunk.append(lost.verdict())
    if not shrunk:
        return []
    known = [text for text in findings.texts if text in paper.ADVANTAGE]
    away = ", ".join(f"{paper.ADVANTAGE[HELD_OUT] - paper.ADVANTAGE[text]:.3f} ({text})" for text in known)
    return [
        "Further analysis: in the paper, L'=4 is worse than MDLM on PTB. The table shows the difference MDLM minus "
        f"L'=4 on each text, in nats per {findings.scale.unit}, and how much smaller it is than on held-out text.",
        table(
            ["text", "MDLM minus L'=4", "decrease from held-out text", "paper: MDLM minus L'=4, nats per token"], lines
        ),
        f"Paper: the difference is smaller on other text, by {away}. **Here: {together(shrunk)}.** The intervals of "
        "the decrease treat the two texts as independent, and are too wide.",
    ]


def one_for_many(findings: Findings) -> str:
    """Write section 9."""
    lines = []
    for size, name in zip((1, *BLOCKS), ("l1-masked", *(f"l{size}" for size in BLOCKS)), strict=True):
        own, shared = findings.measured(name), findings.measured("any", HELD_OUT, size)
        difference = Difference.between(shared, own, findings.seeds())
        verdict = {HOLDS: "more", FAILS: "less"}.get(difference.verdict(), UNDECIDED)
        lines.append([f"L'={size}", findings.cells(own)[0], findings.cells(shared)[0], difference, verdict])
    return "\n\n".join(
        [
            f"NELBOs are in nats per {findings.scale.unit}.",
            table(
                [
                    "block size",
                    "one model per block size",
                    "one model for all",
                    "all minus one per size",
                    "the model for all costs",
                ],
                lines,
            ),
            "The paper trains one model per block size. The model for all trains with four block sizes, and sees a "
            "quarter of the tokens with each.",
        ]
    )
