"""Folders of a process's own, which go with it, or when the next process makes one of the same kind.

A file beside each, named like it with `.lock` at the end, is locked (flock(2)) for as long as the process lives: the
kernel lets go of the lock however a process ends, so that what lies there unlocked was left by a dead one. On NFS the
server keeps the lock, and other nodes see it. Where a file system has no locks, nothing is taken for left behind.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

LOCK = ".lock"
_ID = "[0-9a-f]{8}"


@contextmanager
def own_folder(parent: Path, prefix: str, mode: int = 0o700) -> Iterator[Path]:
    """Make the folder `prefix` + 8 hexadecimal digits in `parent`, which is there, and remove it when the block ends.

    What processes of this user that are dead have left in `parent` under the same prefix is removed before. Nothing
    of another user, and nothing that is no regular file, is opened, and no link is followed: whoever can write in
    `parent`, as everybody can in a temporary folder, neither stops this nor has it remove anything else.

    Raises:
        OSError: `parent` is missing, cannot be written or is full.
    """
    _remove_left(parent, prefix)
    folder, descriptor = _make(parent, prefix, mode)
    try:
        with _spared_by_cleaners(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _lock_of(folder).unlink(missing_ok=True)
        os.close(descriptor)


def temporary_folder(kind: str) -> AbstractContextManager[Path]:
    """An `own_folder` in the temporary one (TMPDIR) with the prefix `bd3_scale-kind-`.

    Raises:
        OSError: there is no temporary folder that can be written.
    """
    return own_folder(Path(tempfile.gettempdir()), f"bd3_scale-{kind}-")


def private_folder(path: Path) -> Path | None:
    """Return the folder `path`, whose name others can guess, made where it is missing; None where it is no folder in
    which this user alone can write.

    Raises:
        OSError: its parent cannot be written.
    """
    with suppress(FileExistsError):
        path.mkdir(0o700)
    found = path.lstat()
    return path if _is_own(found, stat.S_IFDIR) and not found.st_mode & 0o022 else None


def try_lock(descriptor: int) -> bool:
    """Take the lock of an open file (flock(2)) unless another process has it. OSError: the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno != errno.EWOULDBLOCK:
            raise
        return False
    return True


@contextmanager
def _spared_by_cleaners(folder: Path) -> Iterator[None]:
    """systemd-tmpfiles removes what has been in a temporary folder for days, but nothing in a folder that is locked."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # no locks here
            try_lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def _make(parent: Path, prefix: str, mode: int) -> tuple[Path, int]:
    """The folder and the descriptor that holds its lock."""
    while True:
        folder = parent / f"{prefix}{secrets.token_hex(4)}"
        with suppress(FileExistsError):  # also of somebody who saw the lock's name and was quicker with the folder's
            flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(_lock_of(folder), flags, 0o600)
            try:
                if _held(descriptor, _lock_of(folder)):
                    folder.mkdir(mode)
                    return folder, descriptor
            except OSError:
                _lock_of(folder).unlink(missing_ok=True)
                os.close(descriptor)
                raise
            os.close(descriptor)


def _held(descriptor: int, lock: Path) -> bool:
    """Whether this process has the lock of a file that it has just made: another might take it for one left behind."""
    try:
        return try_lock(descriptor) and os.path.samestat(os.fstat(descriptor), lock.lstat())
    except FileNotFoundError:
        return False
    except OSError:
        return True  # no locks here: nobody takes anything for left behind


def _remove_left(parent: Path, prefix: str) -> None:
    name = re.compile(re.escape(prefix) + _ID + re.escape(LOCK))
    with os.scandir(parent) as entries:
        locks = [Path(entry.path) for entry in entries if name.fullmatch(entry.name)]
    for lock in locks:
        with suppress(OSError):  # gone by now, or not to be removed: the next process tries again
            if _is_own(lock.lstat(), stat.S_IFREG):
                _remove_if_left(lock)


def _remove_if_left(lock: Path) -> None:
    descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if _is_own(found, stat.S_IFREG) and try_lock(descriptor) and os.path.samestat(found, lock.lstat()):
            folder = lock.with_suffix("")
            with suppress(FileNotFoundError):
                if not _is_own(folder.lstat(), stat.S_IFDIR):
                    return
                shutil.rmtree(folder)
            lock.unlink()
    finally:
        os.close(descriptor)


def _is_own(found: os.stat_result, kind: int) -> bool:
    return found.st_uid == os.geteuid() and stat.S_IFMT(found.st_mode) == kind


def _lock_of(folder: Path) -> Path:
    return folder.with_name(folder.name + LOCK)
