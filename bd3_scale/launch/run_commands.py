"""Offer `bd3-scale report` and `bd3-scale watch`: what a run shows, as a page and in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bd3_scale.observe.console import say

app = typer.Typer()


@app.command(epilog="Example: bd3-scale report runs/quickstart --out report.html")
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories; several are compared.", metavar="RUN")],
    out: Annotated[
        Path | None, typer.Option(help="The page to write.", show_default="report.html in the first RUN")
    ] = None,
) -> None:
    """Write one HTML page, which needs no network, with the curves, events, samples and recipes of runs."""
    from bd3_scale.launch.run_report import write_report

    page = out or runs[0] / "report.html"
    write_report(runs, page)
    say(f"wrote {page}")


@app.command(epilog="Example: bd3-scale watch runs/quickstart")
def watch(run: Annotated[Path, typer.Argument(help="Run directory.", metavar="RUN")]) -> None:
    """Show a run live in the terminal until it is done or Ctrl-C; where stdout is no terminal, as plain lines."""
    from bd3_scale.observe.console import Console
    from bd3_scale.observe.follow import RunFollower
    from bd3_scale.observe.watch import watch_run

    watch_run(RunFollower(run), Console(highlight=False))
