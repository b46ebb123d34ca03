"""Train, measure and write up the paper's tables in small: docs/reproduction.md.

    python tools/reproduce.py --train books-train.jsonl.zst --validation books-valid.jsonl.zst \
        --text wikitext2=wikitext2-test.txt --text ptb=ptb-test.txt
    python tools/reproduce.py --quick

What has a record already (docs/reproduction/) is not done again: an interrupted reproduction goes on.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))  # from a checkout that is not installed

from bd3_scale.evaluate.sets import NamedText
from tools.reproduction.jobs import Work, run_jobs
from tools.reproduction.rows import SCALES

console = Console(highlight=False)


def main(
    train: Annotated[Path, typer.Option(help="Text to train on.")],
    validation: Annotated[Path | None, typer.Option(help="Held-out text; default: a share of the documents.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="SET=PATH or PATH of other text to measure.")] = None,
    scale: Annotated[str, typer.Option(help=f"One of {', '.join(SCALES)}.")] = "small",
    out: Annotated[Path, typer.Option(help="Folder of records and plots; the page is beside it.")] = Path(
        "docs/reproduction"
    ),
    work: Annotated[Path, typer.Option(help="Folder of data and runs.")] = Path("runs/reproduction"),
    jobs: Annotated[int, typer.Option(min=1, help="Rows that train at once, each on one thread.")] = 2,
) -> None:
    """Reproduce the paper's tables in small."""
    texts = {NamedText.parse(argument).name: argument for argument in text or ()}
    todo = Work(SCALES[scale], work.absolute() / scale, out / "records", train, validation, texts)
    # As an interrupt does: what runs is asked to save and end.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    todo.prepare("bytes")
    failed = run_jobs(todo, jobs, lambda lines: console.print(*lines, sep="\n"))
    if failed:
        console.print("[red]failed:", *failed, sep="\n")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
