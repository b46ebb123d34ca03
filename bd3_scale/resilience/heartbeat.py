"""What a rank is doing, told once a second to the supervisor of its job."""

from __future__ import annotations

import faulthandler
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal

from bd3_scale.resilience.recorder import tell_collectives
from bd3_scale.resilience.terminal import tell

INTERVAL_SECONDS = 1.0
_PACKAGE = Path(__file__).parents[1]
FOLDER_VARIABLE = "BD3_SCALE_HEARTBEATS"
Phase = Literal["start", "step", "data", "checkpoint", "evaluation", "stopped", "done", "failed"]


def is_watched() -> bool:
    """Return whether somebody reads this rank's heartbeats."""
    return FOLDER_VARIABLE in os.environ


class Heartbeat:
    """Keeps `rank<k>.json` in the folder of $BD3_SCALE_HEARTBEATS; does nothing where that is not set.

    A context manager. The file holds `phase`, `step` (finished), `saved` (step of the newest checkpoint), `beat`, which
    counts up for as long as the process lives and is not stopped, `at`, where the main thread is, and at the end
    `error` and `time` (seconds since the epoch). A thread writes it, so that training waits for no file.
    `launch.watch` reads it. Inside, SIGUSR2 prints to stderr the stacks of all threads, and the collectives that the
    rank waits in. To be entered in the main thread.
    """

    def __init__(self) -> None:
        folder = os.environ.get(FOLDER_VARIABLE)
        self._path = Path(folder, f"rank{os.environ.get('RANK', '0')}.json") if folder else None
        self._state: dict[str, str | int | float | None] = {"phase": "start", "step": 0, "saved": 0, "beat": 0}
        self._lock = threading.Lock()
        self._numbers = self._told = -1
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Heartbeat:
        if self._path is not None:
            # A signal's number, or 0 at the end, for the thread: the main one may wait in a collective.
            self._numbers, self._told = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            # Stacks are printed whatever a thread holds; then the handler below tells the number to the thread.
            signal.signal(signal.SIGUSR2, lambda *_: None)
            signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)
            faulthandler.register(signal.SIGUSR2, all_threads=True, chain=True)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._path is None:
            return
        if error is not None:
            self._state |= {"phase": "failed", "error": f"{type(error).__name__}: {error}", "time": time.time()}
        signal.set_wakeup_fd(-1)
        os.write(self._told, b"\0")
        self._thread.join()
        os.close(self._told)
        os.close(self._numbers)
        self._write()

    def resumed(self, step: int) -> None:
        """Tell that a checkpoint of `step` was loaded, or none (0)."""
        self._state |= {"step": step, "saved": step}

    def finished(self, step: int) -> None:
        """Tell that `step` is done. Before the first one a rank is at its start, which may compile and download."""
        self._state |= {"phase": "step", "step": step}

    def saved(self, step: int) -> None:
        """Tell that a checkpoint of `step` is complete."""
        self._state["saved"] = step

    def end(self, phase: Literal["stopped", "done"]) -> None:
        """Tell that the run was asked to stop and is saved, or has taken all its steps."""
        self._state["phase"] = phase

    @contextmanager
    def during(self, phase: Literal["data", "checkpoint", "evaluation"]) -> Iterator[None]:
        """Mark work that has a deadline of its own; `data`: this rank waits for a batch, and others perhaps for it."""
        before = self._state["phase"]
        self._state["phase"] = phase
        yield
        self._state["phase"] = before

    def _beat(self) -> None:
        numbers = b""
        while 0 not in numbers:
            self._write()
            came, _, _ = select.select([self._numbers], [], [], INTERVAL_SECONDS)
            numbers = os.read(self._numbers, 64) if came else b""
            if signal.SIGUSR2 in numbers:
                _tell_collectives()

    def _write(self) -> None:
        assert self._path is not None
        with self._lock:
            self._state |= {"beat": int(self._state["beat"] or 0) + 1, "at": _whereabouts()}
            aside = self._path.with_suffix(".new")
            try:
                aside.write_text(json.dumps(self._state))
                aside.replace(self._path)
            except OSError:
                # A full or hanging file system is the training's to report: its checkpoints go to the same place.
                return


def _tell_collectives() -> None:
    try:
        lines = tell_collectives()
    except (RuntimeError, LookupError, ValueError, TypeError) as error:
        # A recorder of another version must not end the thread, by which a rank is known to live.
        lines = [f"PyTorch's flight recorder could not be read: {error!r}"]
    for line in lines:
        tell(line)


def _whereabouts() -> str:
    """Where the main thread is: the collective that it waits in, if any, and the innermost place of this package."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    collective = ""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if not collective and path.parent.name == "distributed":
            collective = f"{frame.f_code.co_name} of "
        if _PACKAGE in path.parents:
            return f"{collective}{path.relative_to(_PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return collective
