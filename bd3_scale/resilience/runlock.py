"""Lock a run directory, so that only one training at a time uses it."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# `struct flock` of fcntl(2) on 64-bit Linux: type, whence, start, length, process.
_FLOCK = "hhqqi4x"


def is_in_use(run_dir: Path) -> bool:
    """Return whether another process trains in `run_dir`, without taking its lock even for a moment.

    False where the folder, its lock or locks at all are missing.
    """
    try:
        descriptor = os.open(run_dir / ".lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        request = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, request))[0]
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return bool(kind != fcntl.F_UNLCK)


@contextmanager
def lock_run(run_dir: Path) -> Iterator[None]:
    """Lock the existing folder `run_dir` for this process until the block or the process ends.

    The lock is a POSIX record lock on `run_dir/.lock` (fcntl(2)): the kernel drops it when the process dies, and child
    processes do not inherit it, so loader workers that outlive a killed training do not keep it.

    Raises:
        ValueError: another process holds the lock (the message names process and host), or `.lock` is no regular file.
        OSError: `run_dir` is missing or not writable, `.lock` is a link, or the file system has no locks.
    """
    path = run_dir / ".lock"
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is not a regular file: remove it")
    with os.fdopen(descriptor, "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise ValueError(
                f"{run_dir} is in use by {file.read(200) or 'another process'}: stop that training first "
                "(SIGTERM makes it save and end), or choose another run_dir"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
