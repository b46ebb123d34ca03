"""Keep a process alive when its stdout or stderr can no longer be written; needs the standard library alone."""

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


def reserve_standard_descriptors() -> None:
    """Open /dev/null where stdin, stdout or stderr are closed: a file opened later would get their descriptor."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def survive_broken_streams(*names: Literal["stdout", "stderr"], log: Path | None = None, patience: float = 5.0) -> None:
    """Make writes to these streams never fail: use it where the output is progress, not a result.

    When a stream breaks (a pipe whose reader ended, a closed terminal, a full disk), its output goes to `log` instead,
    with a note, and so does the output of libraries and child processes. When nobody reads, as in a terminal stopped
    with Ctrl-S, output is dropped after `patience` seconds until somebody reads again. A second call changes the log.
    """
    for name in names:
        stream = getattr(sys, name)
        if (file := _file_behind(stream, name)) is None:
            continue
        if isinstance(file, _SurvivingFile):
            file.log = log
            continue
        with contextlib.suppress(OSError):
            stream.flush()
        buffer = io.BufferedWriter(_SurvivingFile(name, log, patience))
        setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", line_buffering=True))


def rank_log(run: Path) -> Path:
    """Return the file in a run directory that continues the output of this rank, or of a launcher."""
    return run / "logs" / f"rank{os.environ.get('RANK', '0')}.log"


@contextmanager
def writing_results() -> Iterator[None]:
    """Raise an OSError that names stdout if the results written inside the block do not arrive.

    The buffer of stdout is then dropped: otherwise Python would flush it again at exit, fail, and exit with code 120.
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
    """Flush stdout; raises as `writing_results` does."""
    if sys.stdout is not None:
        with writing_results():
            sys.stdout.flush()


def _file_behind(stream: Any, name: str) -> io.FileIO | None:
    """Return the raw file of a stream if it is still this process's own one, None if a caller replaced the stream."""
    buffer = getattr(stream, "buffer", None)
    file = getattr(buffer, "raw", buffer)  # with PYTHONUNBUFFERED there is no buffer between
    return file if isinstance(file, io.FileIO) and file.fileno() == _DESCRIPTORS[name] else None


class _SurvivingFile(io.FileIO):
    """The file of a standard stream whose reader may go away or stop reading."""

    def __init__(self, name: str, log: Path | None, patience: float) -> None:
        super().__init__(_DESCRIPTORS[name], "w", closefd=False)
        self.log = log
        self._stream, self._patience = name, patience
        self._broken = self._stuck = False
        self._poll = select.poll()
        self._poll.register(self.fileno(), select.POLLOUT)

    def write(self, data: Any, /) -> int:
        """Write a part of `data`, or drop all of it; return how many bytes are done with."""
        view = memoryview(data).cast("B")
        if not self._is_ready():
            return len(view)
        try:
            # A pipe that poll(2) reports ready takes at least PIPE_BUF bytes without blocking (pipe(7)).
            return super().write(view[: select.PIPE_BUF]) or len(view)
        except OSError as error:
            if self._broken:
                return len(view)
            self._broken = True
            self._continue_in_log(error)
            return self.write(view)

    def _is_ready(self) -> bool:
        ready = bool(self._poll.poll(0 if self._stuck else 1000 * self._patience))
        if not ready and not self._stuck:
            self._note("has no reader: its output is dropped until somebody reads")
        self._stuck = not ready
        return ready

    def _continue_in_log(self, error: OSError) -> None:
        if self.log is None:
            return
        with contextlib.suppress(OSError):
            self.log.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            os.dup2(descriptor, self.fileno())
            os.close(descriptor)
            self._note(f"is lost ({error.strerror}): its output continues in {self.log}")

    def _note(self, what: str) -> None:
        """Write a note to the log, and to stderr unless that is the broken stream."""
        line = f"note: {self._stream} {what}"
        with contextlib.suppress(OSError):
            if self.log is not None:
                with self.log.open("a", errors="backslashreplace") as log:
                    log.write(f"{clean(line)}\n")
        if self._stream != "stderr":
            tell(line)
