"""Run a training, or the replay of a step, in the process of a rank."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from bd3_scale.checkpoint.saver import is_saving
from bd3_scale.observe.console import put
from bd3_scale.parallel.groups import is_left_open
from bd3_scale.recipe.schema import Recipe
from bd3_scale.resilience.heartbeat import Heartbeat
from bd3_scale.resilience.leftovers import private_folder, temporary_folder
from bd3_scale.resilience.limits import exhausted_limit
from bd3_scale.resilience.output import flush_results
from bd3_scale.resilience.terminal import tell
from bd3_scale.train.loop import train
from bd3_scale.train.replay import replay

COMPILED = "TORCHINDUCTOR_CACHE_DIR"


def main(recipe: Recipe) -> None:
    """Train in this process; an error that a person can mend ends it with a message, without a traceback.

    The exit code is 2 if another try cannot help, 1 if it may: ranks could not connect, a loader worker was killed.
    """
    with _immediate_exit_on_error(), _errors_for_people(), own_temporary_files(), Heartbeat() as heartbeat:
        train(recipe, heartbeat)


def main_of_replay(recipe: Recipe, step: int) -> None:
    """Compute a step again; rank 0 prints a line of JSON."""
    with _immediate_exit_on_error(), _errors_for_people(), own_temporary_files(), Heartbeat() as heartbeat:
        replayed = replay(recipe, step, heartbeat)
        heartbeat.end("done")
        if os.environ.get("RANK", "0") == "0":
            result = asdict(replayed) | {"same": replayed.same}
            # As in the metrics: JSON has no NaN and no infinity.
            result |= {key: result[key] if math.isfinite(result[key]) else None for key in ("loss", "grad_norm")}
            put(json.dumps(result))
            flush_results()


@contextmanager
def own_temporary_files() -> Iterator[None]:
    """Give this process and its children a temporary folder of their own that is removed with it, see `locked_folder`.

    Weights & Biases and PyTorch leave theirs behind where a run is killed. What torch.compile made for a GPU stays for
    the next run, in a folder that nobody else can write: it is code that runs.

    Raises:
        OSError: the temporary folder (TMPDIR) cannot be written or is full.
    """
    shared = Path(tempfile.gettempdir())
    with temporary_folder("rank") as folder:
        own = {"TMPDIR": str(folder)}
        if torch.cuda.is_available() and COMPILED not in os.environ:
            kept = private_folder(shared / f"bd3_scale-compiled-{os.geteuid()}")
            own |= {COMPILED: str(kept)} if kept else {}
        before = {name: os.environ.get(name) for name in own}
        os.environ |= own
        tempfile.tempdir = str(folder)
        try:
            yield
        finally:
            tempfile.tempdir = str(shared)
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


@contextmanager
def _immediate_exit_on_error() -> Iterator[None]:
    """Exit at once if an error leaves a save or groups of GPUs behind: their threads wait for ranks that are gone,
    and would turn an orderly exit into a hang, or into an abort with another exit code.
    """
    try:
        yield
    except BaseException as error:
        if not (is_saving() or is_left_open()):
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
        limit = exhausted_limit(error)
        if os.environ.get("BD3_DEBUG") or not (limit or isinstance(error, (ValueError, OSError, FloatingPointError))):
            raise
        tell(f"error: {limit or error}")
        raise SystemExit(1 if isinstance(error, ConnectionError) else 2) from None
