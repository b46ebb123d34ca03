"""Make folders that vanish with their process: a killed process's folder is removed by the next one of the same kind.

Each folder has a lock file next to it, with the same name and `.lock`. The process holds its lock (flock(2)) while it
lives, and the kernel releases the lock however the process ends. So an unlocked folder was left by a dead process. On
NFS the server keeps the lock, and other nodes see it. On a file system without locks, nothing counts as left behind.
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
def locked_folder(parent: Path, prefix: str, mode: int = 0o700) -> Iterator[Path]:
    """Make the folder `prefix` + 8 hexadecimal digits in the existing `parent`, and remove it when the block ends.

    First removes what dead processes of this user left in `parent` under the same prefix. Files of other users and
    special files are never opened, and no link is followed: someone else who can write in `parent`, as anyone can in
    /tmp, can neither block this nor make it remove anything else.

    Raises:
        OSError: `parent` is missing, cannot be written or is full.
    """
    _remove_leftovers(parent, prefix)
    folder, descriptor = _make(parent, prefix, mode)
    try:
        with _protected_from_cleaners(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _lock_of(folder).unlink(missing_ok=True)
        os.close(descriptor)


def temporary_folder(kind: str) -> AbstractContextManager[Path]:
    """Make a `locked_folder` in the temporary folder (TMPDIR), with the prefix `bd3_scale-kind-`.

    Raises:
        OSError: no temporary folder is writable.
    """
    return locked_folder(Path(tempfile.gettempdir()), f"bd3_scale-{kind}-")


def private_folder(path: Path) -> Path | None:
    """Return the folder `path`, made if missing, or None if another user owns it or could write in it.

    For names that others can guess: someone else may have made a folder, a link or a file there first.

    Raises:
        OSError: its parent cannot be written.
    """
    with suppress(FileExistsError):
        path.mkdir(0o700)
    status = path.lstat()
    return path if _is_own(status, stat.S_IFDIR) and not status.st_mode & 0o022 else None


def try_lock(descriptor: int) -> bool:
    """Lock an open file (flock(2)); return False if another process holds it. OSError: the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno != errno.EWOULDBLOCK:
            raise
        return False
    return True


@contextmanager
def _protected_from_cleaners(folder: Path) -> Iterator[None]:
    """Lock the folder itself: systemd-tmpfiles removes old files from /tmp, but skips folders that are locked."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # a file system without locks
            try_lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def _make(parent: Path, prefix: str, mode: int) -> tuple[Path, int]:
    """Make the folder; return it with the descriptor that holds its lock."""
    while True:
        folder = parent / f"{prefix}{secrets.token_hex(4)}"
        with suppress(FileExistsError):  # also if another process read the lock's name and made the folder first
            flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(_lock_of(folder), flags, 0o600)
            try:
                if _holds(descriptor, _lock_of(folder)):
                    folder.mkdir(mode)
                    return folder, descriptor
            except OSError:
                _lock_of(folder).unlink(missing_ok=True)
                os.close(descriptor)
                raise
            os.close(descriptor)


def _holds(descriptor: int, lock: Path) -> bool:
    """Lock a file that was just made; return False if another process took it for a leftover and removed it."""
    try:
        return try_lock(descriptor) and os.path.samestat(os.fstat(descriptor), lock.lstat())
    except FileNotFoundError:
        return False
    except OSError:
        return True  # no locks on this file system: no process removes leftovers here


def _remove_leftovers(parent: Path, prefix: str) -> None:
    name = re.compile(re.escape(prefix) + _ID + re.escape(LOCK))
    with os.scandir(parent) as entries:
        locks = [Path(entry.path) for entry in entries if name.fullmatch(entry.name)]
    for lock in locks:
        with suppress(OSError):  # already gone, or not removable: the next process tries again
            if _is_own(lock.lstat(), stat.S_IFREG):
                _remove_if_unlocked(lock)


def _remove_if_unlocked(lock: Path) -> None:
    descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        # `samestat`: between open and lock, the owner may have removed this file and someone made another of its name.
        if _is_own(status, stat.S_IFREG) and try_lock(descriptor) and os.path.samestat(status, lock.lstat()):
            folder = lock.with_suffix("")
            with suppress(FileNotFoundError):
                if not _is_own(folder.lstat(), stat.S_IFDIR):
                    return
                shutil.rmtree(folder)
            lock.unlink()
    finally:
        os.close(descriptor)


def _is_own(status: os.stat_result, file_type: int) -> bool:
    return status.st_uid == os.geteuid() and stat.S_IFMT(status.st_mode) == file_type


def _lock_of(folder: Path) -> Path:
    return folder.with_name(folder.name + LOCK)
