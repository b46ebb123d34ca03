"""Reading files that others made: sizes are bounded before memory is, and what is wrong is told in one line."""

from __future__ import annotations

import functools
import inspect
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, ParamSpec, TypeVar

from pydantic import ValidationError

# Of a file that is held in memory whole, such as a configuration or a tokeniser; the largest of these have 40 MB.
LIMIT_BYTES = 1 << 27

P = ParamSpec("P")
T = TypeVar("T")

_OURS = f"{__name__.partition('.')[0]}."


def read_regular(path: Path, limit: int = LIMIT_BYTES) -> bytes:
    """Return the bytes of a regular file, of at most `limit`.

    Raises:
        ValueError: it is a FIFO, a device or a socket, which might never end, or it is larger. OSError: it is missing,
        a folder, or cannot be read.
    """
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path} is larger than {limit / 2**20:g} MiB, which no such file should be")
    return data


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Raises as `read_regular` does, but for the size."""
    # Without O_NONBLOCK the opening of a FIFO waits for somebody who writes.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"{path} is no regular file (a pipe, a device or a socket): give a file")
    return file


def is_panic(error: BaseException) -> bool:
    """Return whether an error is a panic of a library in Rust, which is no Exception."""
    return type(error).__name__ == "PanicException"


@contextmanager
def panics_told(what: str) -> Iterator[None]:
    """Turn a panic of a library in Rust inside the block into a ValueError that begins with `what`."""
    try:
        yield
    except BaseException as error:
        if is_panic(error):
            raise ValueError(f"{what}: {in_one_line(error)}") from error
        raise


def reader(what: str, path: str = "path") -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Mark a function that reads a file or folder of others as `what`: it raises ValueError or OSError alone.

    Every other error of the function becomes a ValueError of one line that names the file; so does a ValueError that
    does not name it, such as json's and pydantic's. Errors of this package's own classes stay, and so does an
    AssertionError, which is a fault of ours.

    Args:
        what: such as "a recipe".
        path: the parameter that holds the file or folder.
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
                place = str(signature.bind(*args, **kwargs).arguments.get(path, "it"))
                if isinstance(error, ValueError) and not isinstance(error, ValidationError) and place in str(error):
                    raise
                raise ValueError(f"{place} cannot be read as {what}: {in_one_line(error)}") from error

        return read

    return mark


def in_one_line(error: BaseException) -> str:
    """Return what an error says, of pydantic's pages the first place and rule, and how many more there are."""
    if isinstance(error, ValidationError):
        details = error.errors(include_url=False, include_context=False, include_input=False)
        more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
        place = ".".join(map(str, details[0]["loc"]))
        return f"{place}: {details[0]['msg']}{more}" if place else f"{details[0]['msg']}{more}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    said = " ".join(str(error).split())[:300]
    return said if isinstance(error, ValueError) and said else f"{type(error).__name__}{': ' if said else ''}{said}"
