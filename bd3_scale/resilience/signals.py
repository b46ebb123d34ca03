"""Signals that ask a run to stop at the next step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGINT ends the process at once inside, as SIGTERM does: Python's own handler waits until C++ code returns."""
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def stop_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that ask a run to stop: SIGTERM, SIGUSR1, SIGINT, and SIGHUP unless it is ignored (nohup)."""
    ignores_hangup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, *(() if ignores_hangup else (signal.SIGHUP,)))


class StopAskedError(BaseException):
    """A signal asks to stop, in a wait that it ends. No Exception: what is tried again is tried after those."""


class StopRequest:
    """Notes `stop_signals`, of SIGINT a first one, instead of dying of them; a second SIGINT raises KeyboardInterrupt.

    A context manager for the main thread, which puts the former handlers back at its end. `signal` is the first one
    that came, or None; nothing comes before it is entered. SLURM warns of the time limit with SIGUSR1 or SIGTERM, as
    the job asks.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._interrupted = self._waits = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in stop_signals():
            self._previous[number] = signal.signal(number, self._note)
        # Blocked by a launcher that holds them back until now; see `launch.supervise`.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._previous)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextmanager
    def ends_wait(self) -> Iterator[None]:
        """Raise StopAskedError where a signal comes inside, or came before: for the main thread's waits for others."""
        self._waits = True
        try:
            if self.signal is not None:
                raise StopAskedError
            yield
        finally:
            self._waits = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT
        self.signal = self.signal or signal.Signals(number)
        if self._waits:
            # Once: the next one may come while this one is handled.
            self._waits = False
            raise StopAskedError
