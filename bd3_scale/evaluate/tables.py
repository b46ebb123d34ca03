"""Show evaluations and generated texts to people, as tables or JSON."""

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


def show_evaluations(evaluations: Sequence[Evaluation]) -> None:
    """Print a table with one row per evaluation, and the perplexity of the unigram model below it.

    If intervals were searched, a second table shows the best ones and the whole of [0, 1].
    """
    first = evaluations[0]
    console = Console()
    unigram = {result.text: f"{result.text} {result.unigram_perplexity:.2f}" for result in evaluations}
    caption = f"Perplexity of the unigram model of the same tokens: {', '.join(unigram.values())}"
    padded = [
        f"{r.text} {r.padded_nelbo:.4f} (blocks of {r.block_size})" for r in evaluations if r.padded_nelbo is not None
    ]
    if padded:
        caption += f"\nNats with the padding of a document's last block, a bound for `generate`: {', '.join(padded)}"
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
    for result in evaluations:
        table.add_row(
            result.text,
            str(result.block_size),
            f"{'' if result.exact else '≤ '}{result.perplexity:.2f}",
            f"{result.nelbo:.4f}",
            *map(_number, (result.noise_standard_error, result.text_standard_error, result.bits_per_byte)),
            f"{result.tokens:,}",
        )
    console.print(table)
    for result in evaluations:
        if result.intervals is not None:
            console.print(_intervals(result))


def as_json_text(evaluations: Sequence[Evaluation]) -> str:
    """Return the evaluations as a JSON list of objects; numbers that are not finite are null, as JSON has none."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps([finite(asdict(result)) for result in evaluations])


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


def show_generative(scores: Generative) -> None:
    """Print the figures, one per row."""
    perplexity = "no text to score" if scores.perplexity is None else f"{scores.perplexity:.2f}"
    table = Table("", "", title=f"{scores.samples} samples of {scores.checkpoint}", show_header=False)
    table.add_row(f"perplexity under {scores.judge}", f"{perplexity} ({scores.judged_tokens:,} of its tokens)")
    table.add_row("entropy of a text's tokens", f"{scores.entropy:.3f} nats")
    table.add_row("repeated 4-grams", f"{scores.repetition:.1%}")
    table.add_row("distinct tokens, pairs", f"{scores.distinct_1:.3f}, {scores.distinct_2:.3f}")
    if scores.mauve is not None:
        table.add_row("MAUVE against human text", f"{scores.mauve:.3f}")
    table.add_row("tokens of a text: median, longest", f"{scores.length_median:g}, {scores.length_max}")
    table.add_row("denoising passes a token", f"{scores.nfe_per_token:.2f}")
    table.add_row("ended by", ", ".join(f"{name} {count}" for name, count in scores.stopped_by.items()))
    Console().print(table)


def show_written(written: Sequence[Written], *, whole: bool, as_json: bool = False) -> None:
    """Print each text behind its prompt, or the `whole` text if gaps were filled, and how it was generated.

    A program that reads the output gets the text unchanged. On a terminal its control characters are escaped: a model's
    output must not be able to control the terminal. as_json: one object per line instead.
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
