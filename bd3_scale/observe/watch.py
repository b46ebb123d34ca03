"""Show a run live in the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from rich.console import Group, RenderableType
from rich.layout import Layout
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table

from bd3_scale.observe.console import Console, styled
from bd3_scale.observe.follow import RunFollower
from bd3_scale.observe.report_data import RunRecords, remaining_seconds, run_events, state_of, step_seconds
from bd3_scale.observe.text_plot import text_plot

REFRESH_SECONDS = 2.0
_STYLES = {"training": "bold green", "done": "bold cyan"}
_PLOT_HEIGHT = 8


def watch_run(follower: RunFollower, console: Console, *, pause: Callable[[float], None] = time.sleep) -> None:
    """Show a run until it is done or the user presses Ctrl-C.

    On a terminal a full screen is refreshed every two seconds, also while no process trains: one may start. Elsewhere
    each new line of numbers is printed, for as long as a process trains.
    """
    try:
        run, _ = follower.refresh()
        for note in run.notes:
            console.print(note, soft_wrap=True)
        watch = _watch_screen if console.is_terminal else _watch_lines
        watch(run, follower, console, pause)
    except KeyboardInterrupt:
        # The usual way to end it, and no error.
        return


def _watch_screen(run: RunRecords, follower: RunFollower, console: Console, pause: Callable[[float], None]) -> None:
    try:
        with Live(dashboard(run, console), console=console, screen=True, auto_refresh=False) as live:
            while state_of(run) != "done":
                pause(REFRESH_SECONDS)
                run, _ = follower.refresh()
                live.update(dashboard(run, console), refresh=True)
    finally:
        # The screen goes; its last state stays as a line.
        console.print(status_line(run), soft_wrap=True)


def _watch_lines(run: RunRecords, follower: RunFollower, console: Console, pause: Callable[[float], None]) -> None:
    console.print(status_line(run), soft_wrap=True)
    while run.in_use:
        pause(REFRESH_SECONDS)
        run, new = follower.refresh()
        for line in filter(None, map(_news, new)):
            console.print(line, soft_wrap=True)
        if any(record.get("train/loss") is not None for record in new):
            console.print(status_line(run), soft_wrap=True)
    if state_of(run) != "done":
        console.print(f"no process trains in {run.folder}: `bd3-scale train` on its recipe goes on", soft_wrap=True)


def status_line(run: RunRecords) -> str:
    """Return the state of a run in one line."""
    numbers = [
        f"{name} {value:{form}}{unit}"
        for name, metric, form, unit in _NUMBERS[:3]
        if (value := run.last(metric)) is not None
    ]
    return "  ".join(
        [f"{run.name}: {state_of(run)}", f"step {run.step:,}/{run.num_steps or '?'}", *numbers, *_eta(run)]
    )


_NUMBERS = (
    ("loss", "train/loss", ".4f", ""),
    ("NELBO", "eval/nelbo", ".4f", ""),
    ("speed", "perf/tokens_per_second", ",.0f", " tokens/s"),
    ("MFU", "perf/mfu", ".1%", ""),
    ("perplexity", "eval/perplexity", ".2f", ""),
    ("learning rate", "train/lr", ".3g", ""),
    ("gradient norm", "train/grad_norm", ".3g", ""),
    ("waits for data", "data/wait_seconds", ".3g", " s"),
)
_MEMORY = (("memory", "memory/peak_rss_bytes"), ("GPU memory", "memory/peak_cuda_bytes"))


def _eta(run: RunRecords) -> list[str]:
    if not run.in_use or run.num_steps is None:
        return []
    seconds = remaining_seconds(step_seconds(run.metrics, run.step), run.num_steps - run.step)
    return [] if seconds is None else [f"ETA {timedelta(seconds=round(seconds))}"]


def _news(record: dict[str, Any]) -> str | None:
    """Return what a new record says beside the numbers of a step: an evaluation, a save, or an event."""
    if "kind" in record:
        return f"step {record['step']}: {record['kind'].replace('_', ' ')}"
    if (nelbo := record.get("eval/nelbo")) is not None:
        return f"step {record['step']}: held-out NELBO {nelbo:.4f} nats a token"
    if "checkpoint/tries" in record:
        return f"step {record['step']}: " + ("not saved" if record.get("checkpoint/failed") else "saved")
    return None


def dashboard(run: RunRecords, console: Console) -> Layout:
    """Return the full screen: numbers, curves, events and the last sample."""
    layout, middle, low = Layout(), Layout(size=_PLOT_HEIGHT + 2), Layout()
    layout.split_column(Layout(_header(run), size=4), middle, low)
    width = console.width // 2 - 4
    middle.split_row(
        Layout(_curve(run, "train/loss", "training loss, median", width)),
        Layout(_curve(run, "eval/nelbo", "held-out NELBO", width)),
    )
    low.split_row(Layout(_numbers(run), size=max(34, console.width // 3)), Layout(_texts(run)))
    return layout


def _header(run: RunRecords) -> RenderableType:
    state = state_of(run)
    words = styled((run.name, "bold"), "  ", (state, _STYLES.get(state, "bold yellow")), f"  {run.folder}")
    total = f" of {run.num_steps:,}" if run.num_steps else ""
    steps = styled(f"step {run.step:,}{total}", *(f"   {eta}" for eta in _eta(run)))
    return Group(words, steps, ProgressBar(total=run.num_steps or run.step or 1, completed=run.step))


def _curve(run: RunRecords, metric: str, title: str, width: int) -> Panel:
    # Steps of a damaged file may not rise, and a curve needs that.
    points = sorted({r["step"]: r[metric] for r in run.metrics if r.get(metric) is not None}.items())
    if not points:
        return Panel(styled(("nothing is recorded yet", "dim")), title=styled(title))
    steps, values = zip(*points, strict=True)
    lines = text_plot(steps, values, max(14, width), _PLOT_HEIGHT)
    return Panel(styled(("\n".join(lines), "cyan")), title=styled(f"{title}: now {values[-1]:.4f}"))


def _numbers(run: RunRecords) -> Panel:
    table = Table.grid("", "", padding=(0, 2))
    for name, metric, form, unit in _NUMBERS:
        if (value := run.last(metric)) is not None:
            table.add_row(name, f"{value:{form}}{unit}")
    for name, metric in _MEMORY:
        if (value := run.last(metric)) is not None:
            table.add_row(name, f"{value / 2**30:.2f} GiB")
    save = next((r for r in reversed(run.metrics) if "checkpoint/tries" in r), None)
    if save is not None:
        table.add_row("checkpoint", f"step {save['step']:,}" + " NOT SAVED" * bool(save.get("checkpoint/failed")))
    return Panel(table, title=styled("numbers"))


def _texts(run: RunRecords) -> Panel:
    parts: list[str | tuple[str, str]] = []
    for event in run_events(run)[-3:]:
        parts += [(f"step {event['step']} {event['kind']} ", "yellow"), f"{event['text']}\n"]
    if run.samples:
        sample = run.samples[-1]
        parts += [(f"sample at step {sample['step']}\n", "bold"), (str(sample.get("prompt", "")), "dim")]
        parts += [str(sample.get("text", ""))]
    return Panel(styled(*(parts or [("no events and no samples yet", "dim")])), title=styled("events and sample"))
