"""What a rank runs."""

from __future__ import annotations

import json
import math
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from bd3_scale.checkpoint.saver import is_saving
from bd3_scale.observe.console import put
from bd3_scale.recipe.schema import Recipe
from bd3_scale.resilience.heartbeat import Heartbeat
from bd3_scale.resilience.limits import exhausted
from bd3_scale.resilience.output import flush_results
from bd3_scale.resilience.terminal import tell
from bd3_scale.train.loop import train
from bd3_scale.train.replay import replay
from bd3_scale.train.temporary import own_temporary_files


def main(recipe: Recipe) -> None:
    """Train in this process; what a person can mend ends it with a message, without a traceback.

    The exit code is 2 where another try cannot help, 1 where it may: ranks did not meet, a loader worker was killed.
    """
    with _even_beside_a_save(), _errors_for_people(), own_temporary_files(), Heartbeat() as heartbeat:
        train(recipe, heartbeat)


def main_of_replay(recipe: Recipe, step: int) -> None:
    """Compute a step again; rank 0 prints a line of JSON."""
    with _errors_for_people(), own_temporary_files(), Heartbeat() as heartbeat:
        found = replay(recipe, step, heartbeat)
        heartbeat.end("done")
        if os.environ.get("RANK", "0") == "0":
            told = asdict(found) | {"same": found.same}
            # As in the metrics: JSON knows no other numbers.
            told |= {key: told[key] if math.isfinite(told[key]) else None for key in ("loss", "grad_norm")}
            put(json.dumps(told))
            flush_results()


@contextmanager
def _even_beside_a_save() -> Iterator[None]:
    """End at once where an error leaves a save behind: its thread waits for ranks that are gone, and would turn an
    orderly end into an abort with another exit code.
    """
    try:
        yield
    except BaseException as error:
        if not is_saving():
            raise
        if not isinstance(error, SystemExit):
            tell("".join(traceback.format_exception(error)))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)


@contextmanager
def _errors_for_people() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        told = exhausted(error)
        if os.environ.get("BD3_DEBUG") or not (told or isinstance(error, (ValueError, OSError, FloatingPointError))):
            raise
        tell(f"error: {told or error}")
        raise SystemExit(1 if isinstance(error, ConnectionError) else 2) from None
