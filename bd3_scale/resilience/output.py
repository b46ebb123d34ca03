"""Keep a process alive when its stdout or stderr can no longer be written, and copy its lines to a log.

It needs the standard library alone.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from bd3_scale.resilience.terminal import clean, tell

_DESCRIPTORS = {"stdout": 1, "stderr": 2}
# A control sequence of terminals: colours, the cursor moves of a progress bar (ECMA-48, section 5.4).
_SEQUENCE = re.compile("\x1b\\[[0-?]*[ -/]*[@-~]")
# The time that `TrainingProgress` writes before a message on a terminal.
_SHORT_TIME = re.compile(r"\d\d:\d\d:\d\d ")


def reserve_standard_descriptors() -> None:
    """Open /dev/null where stdin, stdout or stderr are closed: a file opened later would get their descriptor."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def survive_broken_streams(
    *names: Literal["stdout", "stderr"],
    log: Path | None = None,
    label: str = "",
    copies: bool = False,
    patience: float = 5.0,
) -> None:
    """Make writes to these streams never fail: use it where the output is progress, not a result.

    When a stream breaks (a pipe whose reader ended, a closed terminal, a full disk), its output goes to `log` instead,
    with a note, and so does the output of libraries and child processes. When nobody reads, as in a terminal stopped
    with Ctrl-S, output is dropped after `patience` seconds until somebody reads again. A second call changes log,
    label and copies.

    Args:
        label: each line that Python writes begins with the time and this label, unless the stream is a terminal.
        copies: append such lines to `log` as well, without control characters. The output of C libraries and child
            processes, which write to the descriptor, is not copied.
    """
    for name in names:
        stream = getattr(sys, name)
        if _file_behind(stream, name) is None:
            continue
        if not isinstance(stream, _LabelledStream):
            with contextlib.suppress(OSError):
                stream.flush()
            stream = _LabelledStream(_SurvivingFile(name, patience), stream.encoding)
            setattr(sys, name, stream)
        stream.file.log, stream.file.copies, stream.label = log, copies, label


def label_rank_output(run: Path) -> None:
    """Begin the lines of this rank with time and rank, as `survive_broken_streams`; rank 0 copies them to its log."""
    rank = os.environ.get("RANK", "0")
    survive_broken_streams("stdout", "stderr", log=rank_log(run), label=f"rank {rank}", copies=rank == "0")


def rank_log(run: Path) -> Path:
    """Return the file in a run directory for the output of this rank; a launcher shares that of rank 0."""
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


class _LabelledStream(io.TextIOWrapper):
    """A standard stream whose lines are labelled and copied; see `survive_broken_streams`."""

    def __init__(self, file: _SurvivingFile, encoding: str) -> None:
        super().__init__(io.BufferedWriter(file), encoding, "backslashreplace", line_buffering=True)
        self.file, self.label = file, ""
        self._line, self._is_line_start = "", True

    def write(self, text: str, /) -> int:
        """Write text; return its length."""
        super().write(self._labelled(text) if self.label and not os.isatty(self.file.fileno()) else text)
        # A broken stream continues in the log itself: a copy would be the second.
        if self.file.copies and not self.file.broken:
            self._copy(text)
        return len(text)

    def _prefix(self) -> str:
        return f"{time.strftime('%Y-%m-%d %H:%M:%S')} [{self.label}] "

    def _labelled(self, text: str) -> str:
        """Return text with the prefix before each line that begins in it."""
        parts = []
        for line in text.splitlines(keepends=True):
            parts += [self._prefix(), line] if self._is_line_start else [line]
            self._is_line_start = line.endswith("\n")
        return "".join(parts)

    def _copy(self, text: str) -> None:
        """Append the lines that `text` completes to the log, but not the states of a progress bar before its last."""
        *lines, self._line = (self._line + text).split("\n")
        self._line = self._line.rpartition("\r")[2]
        for line in lines:
            shown = _SHORT_TIME.sub("", _SEQUENCE.sub("", line.rstrip("\r").rpartition("\r")[2]), count=1)
            if shown:
                self.file.append(f"{self._prefix()}{clean(shown)}\n")


class _SurvivingFile(io.FileIO):
    """The file of a standard stream whose reader may go away or stop reading."""

    def __init__(self, name: str, patience: float) -> None:
        super().__init__(_DESCRIPTORS[name], "w", closefd=False)
        self.log: Path | None = None
        self.copies = False
        self.broken = False
        self._stream, self._patience = name, patience
        self._stuck = False
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
            if self.broken:
                return len(view)
            self.broken = True
            self._continue_in_log(error)
            return self.write(view)

    def _is_ready(self) -> bool:
        ready = bool(self._poll.poll(0 if self._stuck else 1000 * self._patience))
        if not ready and not self._stuck:
            place = f"continues in {self.log} alone" if self.copies else "is dropped"
            self._note(f"has no reader: its output {place} until somebody reads")
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
        """Write a note to the log, and to stderr unless that is the broken stream; a copying stderr writes both."""
        line = f"note: {self._stream} {what}"
        if not (self.copies and self._stream != "stderr"):
            self.append(f"{clean(line)}\n")
        if self._stream != "stderr":
            tell(line)

    def append(self, text: str) -> None:
        """Append to the log; ignore it if the log cannot be written, as on a full disk."""
        if self.log is None:
            return
        with contextlib.suppress(OSError):
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a", errors="backslashreplace") as log:
                log.write(text)
