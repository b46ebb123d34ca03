"""Read files that others made: bound the size before memory is used, and report what is wrong in one line."""

from __future__ import annotations

import errno
import functools
import inspect
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, ParamSpec, TypeVar

from pydantic import ValidationError

# For a file that is held in memory whole, such as a configuration or a tokeniser; the largest known ones have 40 MB.
LIMIT_BYTES = 1 << 27

P = ParamSpec("P")
T = TypeVar("T")

_OURS = f"{__name__.partition('.')[0]}."


def read_regular(path: Path, limit: int = LIMIT_BYTES) -> bytes:
    """Return the bytes of a regular file.

    Raises:
        ValueError: the file is a FIFO, a device or a socket, which might never end, or has more than `limit` bytes.
        OSError: it is missing, a folder, or not readable.
    """
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path} is larger than {limit / 2**20:g} MiB, the limit for such a file: check what it is")
    return data


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Raises as `read_regular` does, except for the size."""
    # Without O_NONBLOCK, opening a FIFO blocks until a writer comes.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        # `os.fdopen` would name the number of the descriptor in its error.
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise ValueError(f"{path} is not a regular file (a pipe, a device or a socket): give a file")


def is_panic(error: BaseException) -> bool:
    """Return whether an error is a panic of a Rust library (PyO3), which derives from BaseException alone."""
    return type(error).__name__ == "PanicException"


@contextmanager
def panics_as_value_errors(what: str) -> Iterator[None]:
    """Turn a panic of a Rust library inside the block into a ValueError whose message begins with `what`."""
    try:
        yield
    except BaseException as error:
        if is_panic(error):
            raise ValueError(f"{what}: {in_one_line(error)}") from error
        raise


def reader(what: str, path: str = "path") -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Mark a function that reads a foreign file or folder: it then raises ValueError or OSError and nothing else.

    Any other error becomes a ValueError of one line that names the file. So does a ValueError that does not name it,
    such as those of json and pydantic. Errors of this package's own classes pass unchanged, and so does an
    AssertionError, which is a bug of this package.
    Args:
        what: what the file should be, such as "a recipe".
        path: the name of the parameter that holds the file or folder.
    """

    def mark(function: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def read(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return function(*args, **kwargs)
            except (OSError, AssertionError):
                raise
            except BaseException as error:
                if not (isinstance(error, Exception) or is_panic(error)) or type(error).__module__.startswith(_OURS):
                    raise
                name = str(signature.bind(*args, **kwargs).arguments.get(path, "it"))
                if isinstance(error, ValueError) and not isinstance(error, ValidationError) and name in str(error):
                    raise
                raise ValueError(f"{name} cannot be read as {what}: {in_one_line(error)}") from error

        return read

    return mark


def in_one_line(error: BaseException) -> str:
    """Return the message of an error in one line; of several pydantic errors, the first one and how many more."""
    if isinstance(error, ValidationError):
        details = error.errors(include_url=False, include_context=False, include_input=False)
        more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
        key = ".".join(map(str, details[0]["loc"]))
        return f"{key}: {details[0]['msg']}{more}" if key else f"{details[0]['msg']}{more}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return "it needs more memory than is available"
    message = " ".join(str(error).split())[:300]
    if isinstance(error, ValueError) and message:
        return message
    return f"{type(error).__name__}{': ' if message else ''}{message}"
