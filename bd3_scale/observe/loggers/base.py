"""Define what a logger is: a further place for the metrics and texts of a run, beside `metrics.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Value = float | int | None


@dataclass(frozen=True)
class LoggedRun:
    """The run that a logger starts with.

    folder: the run directory. config: the recipe as JSON. after_step: the step that training resumes from, 0 for a new
    run; an earlier attempt may have logged later steps, which are taken again. evaluates_again: the evaluation at
    `after_step` is repeated, too.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    after_step: int = 0
    evaluates_again: bool = False


class Logger:
    """A place for metrics and texts, written by rank 0 alone. A plug-in overrides what its place can take.

    `start` is called once, before everything else, and `finish` once, at the end. An exception in any method turns the
    logger off with one warning; the run goes on.
    """

    @classmethod
    def obstacle(cls) -> str | None:
        """Return why the logger cannot run here and what helps, such as a missing package; None: nothing is missing.

        It is asked before the training starts.
        """
        return None

    def start(self, run: LoggedRun) -> None:
        """Open the place for a run."""

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        """Write the metrics of a step by their names, such as `train/loss`. A value may be NaN, infinite or None."""

    def log_text(self, step: int, name: str, text: str) -> None:
        """Write a text of a step, such as a sample."""

    def finish(self, *, failed: bool) -> None:
        """Close the place; failed: the run ends with an error."""
