"""Evaluations and texts as people read them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from bd3_scale.evaluate.checkpoint import Evaluation
from bd3_scale.evaluate.generative import Generative
from bd3_scale.generate.writer import Written
from bd3_scale.observe.console import Console, put, styled


def show_evaluations(found: Sequence[Evaluation]) -> None:
    """One row each, beside the perplexity of the unigram model.

    Then, where intervals were searched, the best of each and the whole of [0, 1].
    """
    first = found[0]
    console = Console()
    unigram = {result.text: f"{result.text} {result.unigram_perplexity:.2f}" for result in found}
    caption = f"Perplexity of the unigram model of the same tokens: {', '.join(unigram.values())}"
    padded = [f"{r.text} {r.padded_nelbo:.4f} (blocks of {r.block_size})" for r in found if r.padded_nelbo is not None]
    if padded:
        caption += f"\nNats with what pads the last block of a document, a bound for `generate`: {', '.join(padded)}"
    table = Table(
        title=f"{first.checkpoint}: nats a token, in sequences of {first.context}",
        caption=caption,
        box=SIMPLE,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("text", overflow="fold")
    for name in ("block", "perplexity", "nats", "± noise", "± text", "bits/byte", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in found:
        table.add_row(
            result.text,
            str(result.block_size),
            f"{'' if result.exact else '≤ '}{result.perplexity:.2f}",
            f"{result.nelbo:.4f}",
            *map(_number, (result.noise_standard_error, result.text_standard_error, result.bits_per_byte)),
            f"{result.tokens:,}",
        )
    console.print(table)
    for result in found:
        if result.intervals is not None:
            console.print(_intervals(result))


def as_json_text(found: Sequence[Evaluation]) -> str:
    """A list of objects; what is not finite, which JSON cannot say, is null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps([finite(asdict(result)) for result in found])


def _intervals(result: Evaluation) -> Table:
    assert result.intervals is not None
    shown = sorted(result.intervals, key=lambda interval: interval.variance)
    shown = shown[:8] + [interval for interval in shown[8:] if (interval.low, interval.high) == (0.0, 1.0)]
    title = f"{result.text}, blocks of {result.block_size}"
    table = Table("mask rates", "variance of a block's loss", "standard error", title=title)
    for interval in shown:
        rates = f"{interval.low:.2f} to {interval.high:.2f}"
        table.add_row(rates, f"{interval.variance:.4f}", f"{interval.standard_error:.4f}")
    return table


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def show_generative(found: Generative) -> None:
    """One figure a row."""
    perplexity = "nothing to judge" if found.perplexity is None else f"{found.perplexity:.2f}"
    table = Table("", "", title=f"{found.samples} samples of {found.checkpoint}", show_header=False)
    table.add_row(f"perplexity under {found.judge}", f"{perplexity} ({found.judged_tokens:,} of its tokens)")
    table.add_row("entropy of a text's tokens", f"{found.entropy:.3f} nats")
    table.add_row("repeated 4-grams", f"{found.repetition:.1%}")
    table.add_row("distinct tokens, pairs", f"{found.distinct_1:.3f}, {found.distinct_2:.3f}")
    if found.mauve is not None:
        table.add_row("MAUVE against human text", f"{found.mauve:.3f}")
    table.add_row("tokens of a text: median, longest", f"{found.length_median:g}, {found.length_max}")
    table.add_row("denoising passes a token", f"{found.nfe_per_token:.2f}")
    table.add_row("ended by", ", ".join(f"{name} {count}" for name, count in found.stopped_by.items()))
    Console().print(table)


def show_written(written: Sequence[Written], *, whole: bool, as_json: bool = False) -> None:
    """Each text behind its prompt, or the `whole` of it where gaps were filled, and how it came about.

    A text is printed as it is, for a program that reads it, but for a terminal: there its controls are escapes.
    as_json: an object a line instead.
    """
    if as_json:
        for text in written:
            put(json.dumps(asdict(text)))
        return
    console = Console(highlight=False)
    for text in written:
        prompt = "" if whole else text.prompt
        if console.is_terminal:
            console.print(styled((prompt, "bold"), text.text))
        else:
            put(prompt + text.text)
        window = f"; a block sees {text.window} tokens" if text.window else ""
        console.print(
            f"{len(text.tokens)} tokens, {text.nfe} denoising and {text.cache_passes} cache passes, ended by "
            f"{text.stopped_by}{window}",
            style="dim",
        )
    tokens, seconds = sum(len(text.tokens) for text in written), {text.seconds for text in written}
    console.print(f"{tokens / sum(seconds):.0f} tokens/s", style="dim")
