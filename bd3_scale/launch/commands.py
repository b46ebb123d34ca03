"""Run `bd3-scale status|logs|stop|requeue`: show a submitted run, and steer it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from bd3_scale.observe.console import Console, put, say

app = typer.Typer()

RunDir = Annotated[Path, typer.Argument(help="Run directory.", metavar="RUN")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


@app.command(epilog="Example: bd3-scale status /shared/runs/8b --json")
def status(run: RunDir, as_json: AsJson = False) -> None:
    """Show state, step, speed, goodput and attempts of a submitted run."""
    from bd3_scale.launch.status import RunStatus, read_status
    from bd3_scale.launch.status import as_json as to_json

    result: RunStatus = read_status(run)
    if as_json:
        put(to_json(result))
        return
    table = Table("", "", title=str(run), show_header=False)
    table.add_row("state", result.state + "".join(f", job {job} {state.lower()}" for job, state in result.jobs.items()))
    table.add_row("step", f"{result.step:,} of {result.steps:,}, saved {result.saved:,}")
    table.add_row("speed", "-" if result.tokens_per_second is None else f"{result.tokens_per_second:,.0f} tokens/s")
    goodput = "-" if result.goodput is None else f"{result.goodput:.1%} of all attempts' time took steps"
    table.add_row("goodput", goodput)
    table.add_row("ETA", "-" if result.eta_seconds is None else str(timedelta(seconds=round(result.eta_seconds))))
    if result.ranks:
        table.add_row("ranks", ", ".join(f"{count} {phase}" for phase, count in result.ranks.items()))
    console = Console()
    console.print(table)
    if result.attempts:
        console.print(_attempts(result.attempts))
    console.print(f"bd3-scale logs {run} --follow   shows the output of rank 0", style="dim")


def _attempts(attempts: list[dict]) -> Table:
    table = Table("", "began", "took", "steps", "outcome", "reason", title="Attempts")
    for attempt in attempts[-10:]:
        table.add_row(
            str(attempt["attempt"]),
            time.strftime("%m-%d %H:%M:%S", time.localtime(attempt["started"])),
            str(timedelta(seconds=round(attempt["ended"] - attempt["started"]))),
            f"{attempt['from_step']}–{attempt['step']}, saved {attempt['saved']}",
            attempt["outcome"],
            f"{attempt['reason']} (job {attempt['job_id']} on {' '.join(attempt['nodes'])})",
        )
    return table


@app.command(epilog="Example: bd3-scale logs /shared/runs/8b --rank 3 --follow")
def logs(
    run: RunDir,
    rank: Annotated[int, typer.Option(min=0, help="The rank whose output is printed.")] = 0,
    supervisor: Annotated[bool, typer.Option("--supervisor", help="Print the batch process's output instead.")] = False,
    attempt: Annotated[int | None, typer.Option(min=0, help="The attempt.", show_default="the newest")] = None,
    lines: Annotated[int, typer.Option(min=1, help="How many lines, from the end.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print new lines until Ctrl-C or the end.")] = False,
) -> None:
    """Print the log of a rank, or of the supervisor."""
    from bd3_scale.launch.status import newest_logs

    path = newest_logs(run, None if supervisor else rank, attempt)
    text = path.read_bytes()
    for line in text.decode(errors="replace").splitlines()[-lines:]:
        put(line)
    if follow:
        for more in _follow(run, path, len(text)):
            put(more, end="")


def _follow(run: Path, path: Path, position: int) -> Iterator[str]:
    """Yield what is appended to a file after `position`, while the run has a job."""
    from bd3_scale.launch.submit import active_jobs

    alive = True
    while alive:
        alive = bool(active_jobs(run))
        until = time.monotonic() + 5
        while time.monotonic() < until:
            with path.open("rb") as file:
                file.seek(position)
                if new := file.read():
                    position += len(new)
                    yield new.decode(errors="replace")
            if not alive:
                break
            time.sleep(0.5)


def follow_run(run: Path) -> None:
    """Print the supervisor's output from its start until the run has no job any more."""
    from bd3_scale.launch.status import newest_logs
    from bd3_scale.launch.submit import active_jobs

    waiting = True
    while waiting and active_jobs(run):
        try:
            path = newest_logs(run, None, None)
            waiting = False
        except FileNotFoundError:
            time.sleep(1)
    if not waiting:
        for text in _follow(run, path, 0):
            put(text, end="")


@app.command(epilog="Example: bd3-scale stop /shared/runs/8b")
def stop(
    run: RunDir, now: Annotated[bool, typer.Option("--now", help="Cancel at once, without a save.")] = False
) -> None:
    """Save and stop a run; `bd3-scale requeue` continues it later."""
    from bd3_scale.launch.submit import stop as stop_run

    done = stop_run(run, now=now)
    for job, what in done.items():
        say(f"job {job} {what}")
    if not done:
        say(f"{run} has no job in the queue")


@app.command(epilog="Example: bd3-scale requeue /shared/runs/8b")
def requeue(run: RunDir) -> None:
    """Save a running run and queue it again, or submit an ended run again with its stored recipe."""
    from bd3_scale.launch.submit import requeue as requeue_run

    say(requeue_run(run))
