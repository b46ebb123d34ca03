"""Write files that appear complete or not at all, and check that a folder is writable before hours are spent."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from bd3_scale.resilience.leftovers import locked_folder
from bd3_scale.resilience.readers import read_regular

_LOG = logging.getLogger(__name__)
_PARTIAL = re.compile(r"\..+\.[0-9a-f]{8}")


def write_atomically(path: Path, data: str | bytes) -> None:
    """Replace the content of `path` with `data` (text as UTF-8): readers see the old file or the new one, never a part.

    This also holds after a crash or a power cut. OSError: the folder is missing, not writable or full; the old file
    is then unchanged.
    """
    # In the same folder: rename(2) is atomic only within one file system.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with partial.open("xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def unused_path(path: Path) -> Path:
    """Return `path`, or the first of `path`-2, `path`-3 … that does not exist if `path` exists."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], numbered) if not os.path.lexists(name))


class Lines:
    """Lines appended to a file. A failed write, as on a full disk, is logged once and retried with the next line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # O_NONBLOCK: a FIFO without a reader fails at once and does not wait; O_NOFOLLOW: no link is followed.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        self._file = os.fdopen(os.open(path, flags, 0o666), "ab", buffering=0)
        self._pending = b""
        self._warned = False

    def write(self, line: str) -> None:
        """Append a line, after the lines that are still pending."""
        self._pending += line.encode() + b"\n"
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            if not self._warned:
                _LOG.warning("%s cannot be written: %s; its lines are kept in memory until it can", self._path, error)
            self._warned = True

    def close(self) -> None:
        """Close the file; pending lines are lost, with a warning."""
        if self._pending:
            _LOG.warning("%s lacks its last %d lines", self._path, self._pending.count(b"\n"))
        self._file.close()


def remove_partial_files(folder: Path) -> None:
    """Remove what a killed `write_atomically` left in a folder. No other process may write there at the same time."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _PARTIAL.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk: without it a power cut may undo a rename (fsync(2))."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; rename it to `out` at the end, or remove it if the block raises.

    Everything is flushed to disk before the rename. Files get the mode that the umask gives new files, because
    safetensors makes its files private. Leftovers of killed processes with the same `out` are removed first, see
    `locked_folder`.

    Raises FileExistsError if `out` exists.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; remove it or choose another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked_folder(out.parent, f".{out.name}.", 0o777) as partial:
        mode = partial.stat().st_mode & 0o666
        yield partial
        for path in [*partial.rglob("*"), partial]:
            if path.is_file():
                path.chmod(mode)
            sync(path)
        try:
            partial.rename(out)
        except OSError as error:
            if not out.exists():
                raise
            raise FileExistsError(f"{out} was made by another process meanwhile; that one is kept") from error
    sync(out.parent)


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a regular file. ValueError: the file holds something else; OSError: no such file."""
    data = read_regular(path)
    try:
        content = json.loads(data.decode())
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be read") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content


def file_hash(path: Path) -> str:
    """Return the XXH3-128 of a file's bytes in hexadecimal: fast, detects damage, but not a deliberate change."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def check_writable(folder: Path, needed_bytes: int = 0) -> None:
    """Make `folder` if it is missing, and check that a file can be written there.

    Raises:
        OSError (FileExistsError, PermissionError, ENOSPC …): `folder` is a file, is not writable, or has less than
            `needed_bytes` free; the message names it.
    """
    probe = folder / f".probe.{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(b"\0")
        finally:
            probe.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        below_file = error.errno in (errno.EEXIST, errno.ENOTDIR)
        way_out = (
            "a part of this path is a file; choose another" if below_file else "make it writable or choose another"
        )
        raise OSError(error.errno, f"{error.strerror}; {way_out}", str(folder)) from error
    if free < needed_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{needed_bytes / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; make room or choose another",
            str(folder),
        )
