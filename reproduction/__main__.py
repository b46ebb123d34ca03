"""Train, measure and write up the paper's tables in small: docs/reproduction.md.

    python -m reproduction --train books-train.jsonl.zst --validation books-valid.jsonl.zst \
        --text wikitext2=wikitext2-test.txt --text ptb=ptb-test.txt
    python -m reproduction --quick

Rows with a record (docs/reproduction/) are not measured again, so an interrupted reproduction continues.
"""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer
from rich.console import Console

from bd3_scale.evaluate.sets import NamedText
from bd3_scale.observe.progress import Bar
from reproduction import efficiency
from reproduction.jobs import Work, run_jobs
from reproduction.page import write_page
from reproduction.records import write_record
from reproduction.rows import SCALES

console = Console(highlight=False)


def main(
    train: Annotated[
        Path | None, typer.Option(help="Text to train on.", show_default="none; --quick has its own")
    ] = None,
    validation: Annotated[Path | None, typer.Option(help="Held-out text.", show_default="a share of --train")] = None,
    text: Annotated[list[str] | None, typer.Option(help="SET=PATH or PATH of other text to measure.")] = None,
    scale: Annotated[str, typer.Option(help=f"One of {', '.join(SCALES)}; paper needs a GPU.")] = "small",
    quick: Annotated[
        bool, typer.Option("--quick", help="Only show that everything works, on Python's help texts.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of records and pictures; the page is written next to it.",
            show_default="docs/reproduction, with the scale's name for other scales",
        ),
    ] = None,
    work: Annotated[Path, typer.Option(help="Folder of data and runs.")] = Path("runs/reproduction"),
    tokenizer: Annotated[
        str | None, typer.Option(help="A tokeniser's folder, for the scale paper.", show_default="bytes")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Rows that train at once, each on one thread.", show_default="cores; 1 on a GPU"),
    ] = None,
    page_only: Annotated[bool, typer.Option("--page", help="Only write the page again.")] = False,
) -> None:
    """Reproduce the paper's tables in small.

    If it is interrupted, running trainings save and end, and the same command continues.
    """
    chosen = SCALES["quick" if quick else scale] if quick or scale in SCALES else None
    if chosen is None:
        fail(f"scale is {scale!r}: give one of {', '.join(SCALES)}")
    out = out or (
        work / "quick-page"
        if chosen.name == "quick"
        else Path("docs") / ("reproduction" if chosen.name == "small" else f"reproduction-{chosen.name}")
    )
    if train is None and chosen.name != "quick" and not page_only:
        fail("there is no text to train on: give it with --train, or try --quick")
    if tokenizer and chosen.tokenizer:
        fail(f"the scale {chosen.name} has its tokeniser, {chosen.tokenizer}: leave --tokenizer out")
    vocabulary = tokenizer or chosen.tokenizer
    try:
        if not page_only:
            if vocabulary is None:
                fail(f"the scale {chosen.name} needs a tokeniser of words: give its folder with --tokenizer")
            texts = {NamedText.parse(argument).name: argument for argument in text or ()}
            source = train or help_topics(work)
            todo = Work(chosen, work.absolute() / chosen.name, out / "records", source, validation, texts)
            todo.prepare(vocabulary)
            run_all(todo, jobs or (1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))))
            measure_efficiency(out / "records", chosen.name == "quick")
        console.print(f"wrote {write_page(chosen, out)}")
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        fail(str(error))


def run_all(todo: Work, at_once: int) -> None:
    """Run all missing jobs with a progress bar; exit with an error if rows failed."""
    with Bar("rows") as bar:

        def show(done: int, total: int, row: str) -> None:
            bar.show(done, total)
            if not sys.stderr.isatty():
                console.print(f"{done} of {total} rows: {row}")

        failed = run_jobs(todo, at_once, show)
    if failed:
        fail("failed: " + "; ".join(failed))


def fail(message: str) -> NoReturn:
    """Print an error and exit."""
    console.print(f"[red]error:[/red] {message}")
    raise typer.Exit(1)


def help_topics(work: Path) -> Path:
    """Write Python's help topics as documents, once, and return the file."""
    path = work / "topics.jsonl"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    topics = [text for text in pydoc_data.topics.topics.values() if text.strip()]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in topics))
    return path


def measure_efficiency(records: Path, quick: bool) -> None:
    """Measure the training efficiency, once; it runs last, so that nothing else uses the machine."""
    if (records / "efficiency-0.json").exists():
        return
    torch.set_num_threads(1)
    write_record(records / "efficiency-0.json", {"row": "efficiency", "seed": 0} | efficiency.measure(quick))


if __name__ == "__main__":
    # SIGTERM is handled like an interrupt: running jobs save and end.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    typer.run(main)
