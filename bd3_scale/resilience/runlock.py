"""Lock a run directory, so that only one training at a time uses it."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
