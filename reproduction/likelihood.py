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
        ["costs more than", f"by nats a {findings.scale.unit}", "holds?"],
        [
            [f"{findings.row(more).title} than {findings.row(less).title}", difference, verdict]
            for (more, less), difference, verdict in zip(pairs, differences, verdicts, strict=True)
        ],
    )
    return "\n\n".join(
        [
            table([*findings.header, "paper: LM1B", "paper: OWT"], lines),
            f"The paper: perplexity grows from AR over L'=4, 8, 16 to MDLM. **Here: {together(verdicts)}.**",
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
            table([*findings.header, "variance of the training loss", "paper: LM1B"], lines),
            "The paper: with uniform mask rates L'=1 costs more than AR, although both have the same expected loss. "
            f"**Here: {gap.verdict()}** ({gap} nats a {findings.scale.unit}).",
            "The paper: with everything masked it is AR's perplexity. **Here: "
            f"{_equal(closed, between)}** (all masked − AR {closed}, uniform − all masked {between}; it holds where "
            "what may be left, interval included, is less than half of what was closed).",
            f"The paper: what uniform rates cost is variance ({uniform} against {masked}). **Here: {variance}**: the "
            f"training loss varies {ratio:.2f} times as much from step to step (95%: a factor of {factor:.2f}).",
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
    rate = f"falls from step {steps - decay} on" if optimizer.schedule == "wsd" else f"is {optimizer.schedule}"
    for size in sizes:
        for name in (f"l{size}", f"l{size}-finetuned"):
            lines.append([findings.row(name).title, *findings.cells(findings.measured(name))])
        difference = findings.compare(f"l{size}-finetuned", f"l{size}")
        sentences.append(
            f"The authors expect training at L'={size} from the start to be the better one. **Here: "
            f"{difference.verdict()}** (from the base − from scratch {difference} nats a {findings.scale.unit})."
        )
    return "\n\n".join(
        [
            table(findings.header, lines),
            "The paper trains 85% of the steps at L'=L, for speed, and gives no figures for training from scratch; its "
            "authors say what they expect in issue 39 of their repository.",
            *sentences,
            f"The base takes steps 1 to {base} of {steps}; the learning rate {rate}. How much of the difference the "
            "short rest makes at that rate was not measured apart.",
        ]
    )


def zero_shot(findings: Findings) -> str:
    """Write section 6, perplexities of other texts; claims are about the two texts that the paper has, too."""
    lines = []
    for name in MAIN:
        cells = [f"{math.exp(findings.measured(name, text).mean):.3f}" for text in findings.texts]
        lines.append([findings.row(name).title, *cells, *paper.ZERO_SHOT.get(name, ("", ""))])
    parts = [table([f"perplexity a {findings.scale.unit}", *findings.texts, "paper: PTB", "paper: WikiText"], lines)]
    claims = {
        "wikitext2": (("l4", "ar", True), ("l4", "mdlm", False)),
        "ptb": (("l4", "ar", True), ("l4", "mdlm", True)),
    }
    for text in findings.texts:
        for first, second, more in claims.get(text, ()):
            difference = findings.compare(first, second, text)
            parts.append(
                f"{text}. The paper: {findings.row(first).title} costs {'more' if more else 'less'} than "
                f"{findings.row(second).title}. **Here: {difference.verdict(more)}** ({difference} nats a "
                f"{findings.scale.unit})."
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
        "Looked into, since on PTB the paper sees blocks of 4 behind MDLM: what MDLM costs more than blocks of 4, in "
        f"nats a {findings.scale.unit}, and how much of that other text takes away.",
        table(["", "MDLM − L'=4", "taken away", "paper, nats a token"], lines),
        f"In the paper other text takes away {away}. The margins take both texts as independent, and are too wide. "
        f"That it takes away something: **{together(shrunk)}** here.",
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
            table(
                ["", "a model each", "one model", "one − each", "one model costs"],
                lines,
            ),
            "The paper trains a model for each block size. One model sees a quarter of the tokens at each of four.",
        ]
    )
