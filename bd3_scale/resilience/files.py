"""Files that appear complete or not at all, and folders that can be written before hours are spent."""

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

from bd3_scale.resilience.leftovers import own_folder
from bd3_scale.resilience.readers import read_regular

_LOG = logging.getLogger(__name__)
_ASIDE = re.compile(r"\..+\.[0-9a-f]{8}")


def write_atomically(path: Path, data: str | bytes) -> None:
    """Replace `path` by `data` (text as UTF-8): whoever reads, and whatever crashes, meets the old file or the new one.

    OSError: the folder is missing, cannot be written or is full; the old file is then untouched.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with aside.open("xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def free_name(path: Path) -> Path:
    """Return `path`, or where something lies there `path` with the first number behind it that is free."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], numbered) if not os.path.lexists(name))


class Lines:
    """Lines appended to a file. What cannot be written, as on a full disk, is told once and waits for the next line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # A FIFO that nobody reads is an error and no wait, and a link is not followed.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        self._file = os.fdopen(os.open(path, flags, 0o666), "ab", buffering=0)
        self._pending = b""
        self._told = False

    def write(self, line: str) -> None:
        """Append a line and all that wait."""
        self._pending += line.encode() + b"\n"
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            if not self._told:
                _LOG.warning("%s cannot be written: %s; its lines wait until it can", self._path, error)
            self._told = True

    def close(self) -> None:
        """Lines that still wait are lost, with a warning."""
        if self._pending:
            _LOG.warning("%s lacks its last %d lines", self._path, self._pending.count(b"\n"))
        self._file.close()


def remove_aside(folder: Path) -> None:
    """Remove what `write_atomically` leaves in a folder if it is killed. Nobody else may write there."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _ASIDE.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk: a power cut may undo a rename without it (fsync(2))."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill aside; it is flushed to disk and renamed to `out` at the end, or removed if the block raises.

    Its files get the mode that the umask gives new ones, whoever wrote them: safetensors makes them private. What a
    process that was killed here has left of the same `out` is removed, see `own_folder`.

    Raises FileExistsError if `out` exists.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; remove it or choose another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with own_folder(out.parent, f".{out.name}.", 0o777) as aside:
        mode = aside.stat().st_mode & 0o666
        yield aside
        for path in [*aside.rglob("*"), aside]:
            if path.is_file():
                path.chmod(mode)
            sync(path)
        try:
            aside.rename(out)
        except OSError as error:
            if not out.exists():
                raise
            raise FileExistsError(f"{out} was made by somebody else in the meantime, and is kept") from error
    sync(out.parent)


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object that a regular file holds. ValueError: it holds none; OSError: there is no such file."""
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
    """XXH3-128 of a file's bytes, in hexadecimal: quick, and sure against damage, though not against intent."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def check_writable(folder: Path, needed_bytes: int = 0) -> None:
    """Make `folder` where it is missing and prove that a file can be written there.

    OSError (FileExistsError, PermissionError, ENOSPC …) that names the folder where it is a file, cannot be written,
    or has less than `needed_bytes` free.
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
        raise OSError(error.errno, f"{error.strerror}; make it writable or choose another", str(folder)) from error
    if free < needed_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{needed_bytes / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; make room or choose another",
            str(folder),
        )
