"""What becomes of a process when its stdout or stderr can no longer be written, with the standard library alone."""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from bd3_scale.resilience.terminal import clean, tell

_DESCRIPTORS = {"stdout": 1, "stderr": 2}


def hold_descriptors() -> None:
    """Put /dev/null where stdin, stdout or stderr are closed: no file that is opened later may take their place."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def outlast(*names: Literal["stdout", "stderr"], log: Path | None = None, patience: float = 5.0) -> None:
    """Make writing to these streams of this process no error, whoever reads them: what is said is no result.

    A stream that breaks (a pipe whose reader went away, a terminal that hung up, a full disk) goes on in `log`, which
    says so, with what libraries and child processes write to it. Where nobody reads, as behind a terminal that was
    stopped with Ctrl-S, what is said is left out after `patience` seconds, until somebody does. Called again, it
    changes the log.
    """
    for name in names:
        stream = getattr(sys, name)
        if (file := _file_behind(stream, name)) is None:
            continue
        if isinstance(file, _Lasting):
            file.log = log
            continue
        with contextlib.suppress(OSError):
            stream.flush()
        buffer = io.BufferedWriter(_Lasting(name, log, patience))
        setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", line_buffering=True))


def rank_log(run: Path) -> Path:
    """Return the file of a run directory in which the output of this rank, or of a launcher, goes on."""
    return run / "logs" / f"rank{os.environ.get('RANK', '0')}.log"


@contextmanager
def results() -> Iterator[None]:
    """Write results to stdout inside, which must arrive.

    OSError, which names stdout: it cannot be written. What it held is then given up: else Python would try again at
    its end, and end with a code of its own.
    """
    try:
        yield
    except OSError as error:
        if (file := _file_behind(sys.stdout, "stdout")) is not None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, file.fileno())
            os.close(nowhere)
        raise OSError(error.errno, error.strerror, "stdout") from error


def flush_results() -> None:
    """Write out what stdout still holds, as `results` does."""
    if sys.stdout is not None:
        with results():
            sys.stdout.flush()


def _file_behind(stream: Any, name: str) -> io.FileIO | None:
    """Return the file of a stream that is still this process's own, and not one that a caller put in its place."""
    buffer = getattr(stream, "buffer", None)
    file = getattr(buffer, "raw", buffer)  # PYTHONUNBUFFERED leaves the buffer out
    return file if isinstance(file, io.FileIO) and file.fileno() == _DESCRIPTORS[name] else None


class _Lasting(io.FileIO):
    """The file behind a standard stream that others may break."""

    def __init__(self, name: str, log: Path | None, patience: float) -> None:
        super().__init__(_DESCRIPTORS[name], "w", closefd=False)
        self.log = log
        self._stream, self._patience = name, patience
        self._broken = self._stuck = False
        self._poll = select.poll()
        self._poll.register(self.fileno(), select.POLLOUT)

    def write(self, data: Any, /) -> int:
        """Write a part of `data`, or all of it to nobody; returns the bytes that are done with."""
        view = memoryview(data).cast("B")
        if not self._takes_more():
            return len(view)
        try:
            # No more than a pipe takes without waiting.
            return super().write(view[: select.PIPE_BUF]) or len(view)
        except OSError as error:
            if self._broken:
                return len(view)
            self._broken = True
            self._go_on_in_log(error)
            return self.write(view)

    def _takes_more(self) -> bool:
        ready = bool(self._poll.poll(0 if self._stuck else 1000 * self._patience))
        if not ready and not self._stuck:
            self._note("is not read by anybody: what is said meanwhile is left out")
        self._stuck = not ready
        return ready

    def _go_on_in_log(self, error: OSError) -> None:
        if self.log is None:
            return
        with contextlib.suppress(OSError):
            self.log.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            os.dup2(descriptor, self.fileno())
            os.close(descriptor)
            self._note(f"is lost ({error.strerror}): what is said from here on is in {self.log}")

    def _note(self, what: str) -> None:
        """Tell it in the log and on stderr, where that is another."""
        line = f"note: {self._stream} {what}"
        with contextlib.suppress(OSError):
            if self.log is not None:
                with self.log.open("a", errors="backslashreplace") as log:
                    log.write(f"{clean(line)}\n")
        if self._stream != "stderr":
            tell(line)
