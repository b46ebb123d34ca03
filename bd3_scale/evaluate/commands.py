"""Define the commands `evaluate`, `harness`, `generative` and `generate`; each imports what it needs when it runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bd3_scale.generate.config import SamplingConfig, WeightType, takes_sampling
from bd3_scale.observe.console import put
from bd3_scale.observe.progress import Bar, is_rank_zero
from bd3_scale.resilience.terminal import tell

if TYPE_CHECKING:
    from bd3_scale.data.chat import Messages

app = typer.Typer()

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Source = Annotated[
    Path, typer.Argument(help="A checkpoint, a run directory for its newest one, or a .bd3.gguf file for llama.cpp.")
]


@app.command(epilog="Example: bd3-scale evaluate runs/books --text ptb=ptb-test.txt --text notes.jsonl --block-size 4")
def evaluate(
    checkpoint: Source,
    data: Annotated[str | None, typer.Option(help="Prepared data.", show_default="what the run trained on")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text in place of held-out data, once or more: PATH as it stands, or SET=PATH, see above."),
    ] = None,
    block_size: Annotated[
        list[int] | None, typer.Option(min=1, help="Once or more.", show_default="that of the training")
    ] = None,
    sequences: Annotated[
        int | None, typer.Option(help="How many sequences, from the first.", show_default="all")
    ] = None,
    draws: Annotated[int, typer.Option(help="Noise draws a sequence; block size 1 is exact and takes one.")] = 4,
    intervals: Annotated[
        bool, typer.Option("--intervals", help="Also the training loss's variance under clipped mask-rate intervals.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity on held-out or other text: a bound from the NELBO, exact at block size 1.

    A sequence has as many tokens as in training and begins without context.
    Documents of a sequence see each other if they did in training. The token
    that ends a document counts; padding does not.

    SET is a tokenised corpus such as ptb, wikitext2, lm1b or lambada. It is
    turned into plain text first, and bytes are counted of that.
    """
    from bd3_scale.evaluate.checkpoint import evaluate_checkpoint
    from bd3_scale.evaluate.sets import NamedText
    from bd3_scale.evaluate.tables import as_json_text, show_evaluations
    from bd3_scale.generate.source import resolve_source

    texts = [NamedText.parse(argument) for argument in text or ()]
    with Bar("evaluating") as bar:
        evaluations = evaluate_checkpoint(
            resolve_source(checkpoint),
            data_path=data,
            texts=texts,
            block_sizes=block_size or (),
            sequences=sequences,
            draws=draws,
            intervals=intervals,
            progress=bar.show,
        )
    if not is_rank_zero():
        return
    for name, count in {(result.text, result.trained_on) for result in evaluations if not result.own}:
        if count is None:
            tell(f"{name}: there are no hashes of the training documents here, so an overlap with them is not checked")
        elif count:
            tell(f"warning: {count} documents of {name} were in the training data, too: the result measures memory")
    if as_json:
        put(as_json_text(evaluations))
        return
    show_evaluations(evaluations)


@app.command(epilog="Example: bd3-scale harness runs/mine --tasks hellaswag,lambada_openai --limit 200")
def harness(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a run directory for its newest one.")],
    tasks: Annotated[str, typer.Option(help="Names of tasks, with commas between; `lm_eval ls tasks` lists them.")],
    include: Annotated[str | None, typer.Option(help="Folder with YAML files of further tasks.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Documents a task, for a first look.", show_default="all")
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Noise draws a continuation; block size 1 takes one.")] = 8,
    as_json: AsJson = False,
) -> None:
    """Run tasks of lm-evaluation-harness: choices by the NELBO, text by greedy generation."""
    import json

    from bd3_scale.checkpoint.folder import resolve_checkpoint
    from bd3_scale.evaluate.harness import evaluate_tasks, show_results

    results = evaluate_tasks(resolve_checkpoint(checkpoint), tasks.split(","), folder=include, limit=limit, draws=draws)
    if as_json:
        put(json.dumps(results["results"]))
    else:
        show_results(results)


@app.command(epilog="Example: bd3-scale generative runs/mine --judge models/gpt2 --samples 64 --top-p 0.9")
@takes_sampling(max_new_tokens=256)
def generative(
    checkpoint: Source,
    judge: Annotated[Path, typer.Option(help="Folder of a causal Hugging Face model that scores the samples.")],
    samples: Annotated[int, typer.Option(min=1, help="Texts, each without a prompt.")] = 64,
    mauve: Annotated[
        Path | None, typer.Option(help="Human text, .txt or .jsonl: also MAUVE against as many pieces of it.")
    ] = None,
    *,
    sampling: SamplingConfig,
    as_json: AsJson = False,
) -> None:
    """Measure samples: generative perplexity under another model, entropy, repetition, distinct n-grams.

    Text that repeats itself has a low perplexity, too: read it together with the other figures.
    """
    import dataclasses
    import json

    from bd3_scale.evaluate.generative import evaluate_generative
    from bd3_scale.evaluate.tables import show_generative
    from bd3_scale.generate.source import resolve_source

    with Bar("generating") as bar:
        scores = evaluate_generative(
            resolve_source(checkpoint),
            judge,
            sampling,
            samples=samples,
            human=mauve,
            progress=bar.show,
        )
    if not is_rank_zero():
        return
    if as_json:
        put(json.dumps(dataclasses.asdict(scores)))
        return
    show_generative(scores)


@app.command(epilog="Example: bd3-scale generate runs/quickstart --prompt 'def main(' --temperature 0.7 --watch")
@takes_sampling()
def generate(
    checkpoint: Source,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue, once or more.")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="One a line, or a .jsonl with `prompt`.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Each --prompt is a message of a person, in the model's chat template.")
    ] = False,
    messages: Annotated[
        Path | None, typer.Option(help="A .jsonl with conversations, lists `messages`, for the chat template.")
    ] = None,
    infill: Annotated[bool, typer.Option("--infill", help="Each [MASK] of a prompt is a gap of one token.")] = False,
    *,
    sampling: SamplingConfig,
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends the text, once or more.")] = None,
    dtype: WeightType = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show the text as it loses its masks.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a line.")] = False,
) -> None:
    """Generate text block by block.

    A special token spelled in a prompt is read as that token, except the mask.
    If documents of the training began with BOS, so does a prompt.

    If a text grows longer than the sequences of the training, a block sees a
    sliding window of that length; the result says so.
    """
    import torch

    from bd3_scale.evaluate.tables import show_written
    from bd3_scale.generate.source import open_writer, resolve_source
    from bd3_scale.observe.progress import DenoisingView

    prompts = _prompts(prompt or (), prompts_file, messages, chat=chat, infill=infill)
    # Only one of them: both would write to the same lines of the terminal.
    with nullcontext() if watch else Bar("generating") as bar, DenoisingView(watch and is_rank_zero()) as view:
        shown = {"watch": view.show} if bar is None else {"progress": bar.show}
        with open_writer(resolve_source(checkpoint), dtype and getattr(torch, dtype)) as writer:
            written = list(writer.write(prompts, sampling, infill=infill, stop=stop or (), **shown))
    if is_rank_zero():
        show_written(written, whole=infill, as_json=as_json)


def _prompts(
    given: Sequence[str], file: Path | None, messages: Path | None, *, chat: bool, infill: bool
) -> list[str | Messages]:
    """Return the prompts: texts, an empty one if none is given, or conversations."""
    from bd3_scale.data.prompts import read_messages, read_prompts

    lines = [*given, *(read_prompts(file) if file else [])]
    if not (chat or messages):
        return [*lines] or [""]
    if infill:
        raise ValueError("--infill fills the gaps of a text, and --chat writes an answer: choose one of them")
    if not (lines or messages):
        raise ValueError("--chat answers a message: give one with --prompt, or conversations with --messages")
    return [[{"role": "user", "content": line}] for line in lines] + (read_messages(messages) if messages else [])
