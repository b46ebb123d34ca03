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


@app.command(epilog="Example: bd3-scale status runs/quickstart --json")
def status(run: RunDir, as_json: AsJson = False) -> None:
    """Show state, step, speed, goodput and attempts of a submitted run."""
    from bd3_scale.launch.status import RunStatus, read_status
    from bd3_scale.launch.status import as_json as to_json

    found: RunStatus = read_status(run)
    if as_json:
        put(to_json(found))
        return
    table = Table("", "", title=str(run), show_header=False)
    table.add_row("state", found.state + "".join(f", job {job} {state.lower()}" for job, state in found.jobs.items()))
    table.add_row("step", f"{found.step:,} of {found.steps:,}, saved {found.saved:,}")
    table.add_row("speed", "-" if found.tokens_per_second is None else f"{found.tokens_per_second:,.0f} tokens/s")
    table.add_row("goodput", "-" if found.goodput is None else f"{found.goodput:.1%} of all attempts' time took steps")
    table.add_row("ETA", "-" if found.eta_seconds is None else str(timedelta(seconds=round(found.eta_seconds))))
    if found.ranks:
        table.add_row("ranks", ", ".join(f"{count} {phase}" for phase, count in found.ranks.items()))
    console = Console()
    console.print(table)
    if found.attempts:
        console.print(_attempts(found.attempts))
    console.print(f"bd3-scale logs {run} --follow   shows what rank 0 says", style="dim")


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


@app.command(epilog="Example: bd3-scale logs runs/quickstart --rank 3 --follow")
def logs(
    run: RunDir,
    rank: Annotated[int, typer.Option(min=0, help="Whose output.")] = 0,
    supervisor: Annotated[bool, typer.Option("--supervisor", help="What the batch process says, instead.")] = False,
    attempt: Annotated[int | None, typer.Option(min=0, help="Of which attempt.", show_default="the newest")] = None,
    lines: Annotated[int, typer.Option(min=1, help="From the end.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as it grows, until Ctrl-C or the end.")] = False,
) -> None:
    """Print the log of a rank, or of the supervisor."""
    from bd3_scale.launch.status import newest_logs

    path = newest_logs(run, None if supervisor else rank, attempt)
    text = path.read_bytes()
    for line in text.decode(errors="replace").splitlines()[-lines:]:
        put(line)
    if follow:
        for more in _grown(run, path, len(text)):
            put(more, end="")


def _grown(run: Path, path: Path, position: int) -> Iterator[str]:
    """Yield what is appended to a file, for as long as the run has a job."""
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
    """Print what the supervisor says of a run until it has no job any more; from the moment it starts."""
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
        for text in _grown(run, path, 0):
            put(text, end="")


@app.command(epilog="Example: bd3-scale stop runs/quickstart")
def stop(
    run: RunDir, now: Annotated[bool, typer.Option("--now", help="Cancel at once, without a save.")] = False
) -> None:
    """Save and end a run for good; `bd3-scale requeue` takes it up again."""
    from bd3_scale.launch.submit import stop as stop_run

    done = stop_run(run, now=now)
    for job, what in done.items():
        say(f"job {job} {what}")
    if not done:
        say(f"{run} has no job in the queue")


@app.command(epilog="Example: bd3-scale requeue runs/quickstart")
def requeue(run: RunDir) -> None:
    """Save and queue a running job again; submit an ended run again, as it was stored."""
    from bd3_scale.launch.submit import requeue as requeue_run

    say(requeue_run(run))
