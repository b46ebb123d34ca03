"""Write once a second what a rank is doing, for the supervisor of its job."""

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

from bd3_scale.resilience.recorder import describe_collectives
from bd3_scale.resilience.terminal import tell

INTERVAL_SECONDS = 1.0
_PACKAGE = Path(__file__).parents[1]
FOLDER_VARIABLE = "BD3_SCALE_HEARTBEATS"
Phase = Literal["start", "step", "data", "checkpoint", "evaluation", "stopped", "done", "failed"]


def is_watched() -> bool:
    """Return whether a supervisor reads this rank's heartbeats."""
    return FOLDER_VARIABLE in os.environ


class Heartbeat:
    """Keeps `rank<k>.json` in the folder of $BD3_SCALE_HEARTBEATS; does nothing if that is not set.

    A context manager, to be entered in the main thread. The file holds `phase`, `step` (the last finished one),
    `saved` (step of the newest checkpoint), `beat` (a counter that grows while the process lives and is not stopped),
    `at` (where the main thread is), and at the end `error` and `time` (seconds since the epoch). A thread writes it,
    so training never waits for the file system. `launch.hangs` reads it. Inside the block, SIGUSR2 prints the stacks
    of all threads and the pending collectives of this rank to stderr.
    """

    def __init__(self) -> None:
        folder = os.environ.get(FOLDER_VARIABLE)
        self._path = Path(folder, f"rank{os.environ.get('RANK', '0')}.json") if folder else None
        self._state: dict[str, str | int | float | None] = {"phase": "start", "step": 0, "saved": 0, "beat": 0}
        self._lock = threading.Lock()
        self._wakeup_read = self._wakeup_write = -1
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Heartbeat:
        if self._path is not None:
            # The thread reads signal numbers from this pipe, and 0 at the end. The main thread cannot print the
            # collectives: Python runs handlers there, and it may be blocked inside one of them.
            self._wakeup_read, self._wakeup_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            # faulthandler prints stacks from C, without the GIL; `chain` then runs Python's handler, whose only task
            # is to write the signal's number to the pipe.
            signal.signal(signal.SIGUSR2, lambda *_: None)
            signal.set_wakeup_fd(self._wakeup_write, warn_on_full_buffer=False)
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
        os.write(self._wakeup_write, b"\0")
        self._thread.join()
        os.close(self._wakeup_write)
        os.close(self._wakeup_read)
        self._write()

    def resumed(self, step: int) -> None:
        """Record that the checkpoint of `step` was loaded, or none (0)."""
        self._state |= {"step": step, "saved": step}

    def finished(self, step: int) -> None:
        """Record that `step` is done. Until the first one the phase stays `start`, which includes compilation."""
        self._state |= {"phase": "step", "step": step}

    def saved(self, step: int) -> None:
        """Record that the checkpoint of `step` is complete."""
        self._state["saved"] = step

    def end(self, phase: Literal["stopped", "done"]) -> None:
        """Record that the run was asked to stop and is saved (stopped), or has taken all its steps (done)."""
        self._state["phase"] = phase

    @contextmanager
    def during(self, phase: Literal["data", "checkpoint", "evaluation"]) -> Iterator[None]:
        """Mark work that has its own deadline; `data`: this rank waits for a batch, and other ranks may wait for it."""
        before = self._state["phase"]
        self._state["phase"] = phase
        yield
        self._state["phase"] = before

    def _beat(self) -> None:
        numbers = b""
        while 0 not in numbers:
            self._write()
            ready, _, _ = select.select([self._wakeup_read], [], [], INTERVAL_SECONDS)
            numbers = os.read(self._wakeup_read, 64) if ready else b""
            if signal.SIGUSR2 in numbers:
                _print_collectives()

    def _write(self) -> None:
        assert self._path is not None
        with self._lock:
            self._state |= {"beat": int(self._state["beat"] or 0) + 1, "at": _whereabouts()}
            # Without fsync, unlike `write_atomically`: a heartbeat need not survive a power cut.
            partial = self._path.with_suffix(".new")
            try:
                partial.write_text(json.dumps(self._state))
                partial.replace(self._path)
            except OSError:
                # The training itself reports a full or hanging file system: its checkpoints go to the same place.
                return


def _print_collectives() -> None:
    try:
        lines = describe_collectives()
    except (RuntimeError, LookupError, ValueError, TypeError) as error:
        # Another PyTorch version may have another format. It must not end this thread: the supervisor would think the
        # rank dead.
        lines = [f"PyTorch's flight recorder could not be read: {error!r}"]
    for line in lines:
        tell(line)


def _whereabouts() -> str:
    """Return the collective that the main thread waits in, if any, and its innermost line in this package."""
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
