"""Show progress: a bar on a terminal; elsewhere, for a training, a plain line now and then.

On a terminal also text while it is denoised.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import Literal

from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from bd3_scale.observe.console import Console, label, styled
from bd3_scale.resilience.terminal import clean

MASK = "[MASK]"
HIDDEN = "░"


def is_rank_zero() -> bool:
    """Return whether this process is rank 0, which prints for all."""
    return os.environ.get("RANK", "0") == "0"


class Bar:
    """A bar on stderr for work whose total becomes known on the way; nothing if stderr is no terminal.

    unit: bytes are shown as kB, MB and so on.
    """

    def __init__(self, what: str, unit: Literal["items", "bytes"] = "items") -> None:
        amount = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(),)
        self._progress = Progress(
            label(what),
            BarColumn(),
            *amount,
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)


class TrainingProgress:
    """The display of step, train loss, held-out NELBO (both nats a token), tokens a second and remaining time.

    A context manager. num_steps: the last step; first_step: finished steps; every_seconds: between two lines if the
    console is no terminal, such as the log of a job.
    """

    def __init__(
        self, num_steps: int, *, first_step: int = 0, every_seconds: float = 10.0, console: Console | None = None
    ) -> None:
        self.console = Console() if console is None else console
        self._num_steps, self._first_step, self._every_seconds = num_steps, first_step, every_seconds
        self._nelbo: float | None = None
        self._started = time.monotonic()
        self._last_line = -float("inf")
        self._bar = Progress(
            label("step"),
            MofNCompleteColumn(),
            BarColumn(),
            label("{task.fields[numbers]}"),
            label("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("", total=num_steps, completed=first_step, numbers="")

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def evaluated(self, nelbo: float) -> None:
        """Show the NELBO per token of an evaluation from the next step on."""
        self._nelbo = nelbo

    def step(self, step: int, *, train_loss: float, tokens_per_second: float) -> None:
        """Show the numbers of `step`, counted from 1."""
        nelbo = "" if self._nelbo is None else f"  NELBO {self._nelbo:.4f}"
        numbers = f"loss {train_loss:.4f}{nelbo}  {tokens_per_second:,.0f} tokens/s"
        if self._bar.live.is_started and not self.console.is_terminal:
            # The terminal was closed, and the output continues in a file.
            self._bar.stop()
        self._bar.update(self._task, completed=step, numbers=numbers)
        now = time.monotonic()
        if not self.console.is_terminal and (now - self._last_line >= self._every_seconds or step == self._num_steps):
            self._last_line = now
            seconds_a_step = (now - self._started) / (step - self._first_step)
            remaining = timedelta(seconds=round(seconds_a_step * (self._num_steps - step)))
            self.message(f"step {step}/{self._num_steps}  {numbers}  ETA {remaining}")

    def message(self, text: str) -> None:
        """Print a line, above the bar if there is one. A terminal shows the time; another stream labels its lines."""
        when = f"{time.strftime('%H:%M:%S')} " if self.console.is_terminal else ""
        self.console.print(when + text, highlight=False, soft_wrap=True)


class DenoisingView:
    """A live view of the end of the text that changed last. A context manager; empty unless `shown`."""

    def __init__(self, shown: bool) -> None:
        self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True) if shown else None

    def __enter__(self) -> DenoisingView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, number: int, text: str) -> None:
        """Show text `number`, with `[MASK]` for each masked token."""
        if self._live is None:
            return
        console = self._live.console
        end = clean(text.replace(MASK, HIDDEN))[-console.width * max(1, console.height - 2) :]
        self._live.update(styled(*((letter, "dim" if letter == HIDDEN else "") for letter in end)), refresh=True)
