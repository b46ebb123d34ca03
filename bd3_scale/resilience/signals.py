"""Turn signals into a request to stop at the next step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


@contextmanager
def interrupt_ends_process() -> Iterator[None]:
    """Let SIGINT end the process at once inside the block: Python's own handler waits until C++ code returns."""
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def stop_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that ask a run to stop: SIGTERM, SIGUSR1, SIGINT, and SIGHUP unless it is ignored (nohup)."""
    ignores_hangup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, *(() if ignores_hangup else (signal.SIGHUP,)))


class StopRequestedError(BaseException):
    """A signal ended a wait. Not an Exception, because retries catch those and would start the wait again."""


class StopRequest:
    """Notes `stop_signals` instead of dying of them; a second SIGINT raises KeyboardInterrupt.

    A context manager for the main thread; it restores the former handlers at the end. `signal` is the first signal
    that came, or None. SLURM announces the time limit with SIGUSR1 or SIGTERM, as the job script requests.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._interrupted = self._waits = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in stop_signals():
            self._previous[number] = signal.signal(number, self._note)
        # A launcher blocks these signals in its children until they can handle them; see `launch.supervise`.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._previous)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextmanager
    def interrupts_wait(self) -> Iterator[None]:
        """Raise StopRequestedError if a signal comes inside the block, or came before it.

        For the main thread, where it waits for another process: without the error the wait would go on.
        """
        self._waits = True
        try:
            if self.signal is not None:
                raise StopRequestedError
            yield
        finally:
            self._waits = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT
        self.signal = self.signal or signal.Signals(number)
        if self._waits:
            # Only once: a second signal may come while the first error is handled.
            self._waits = False
            raise StopRequestedError
