"""One training at a time in a run directory."""

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
    """Hold the existing folder `run_dir` for this process until the block ends or the process dies, however it dies.

    The lock is POSIX's on `run_dir/.lock` (fcntl(2)): it belongs to the process alone, so that loader workers that
    outlive a killed training do not keep it. ValueError: another process holds it, named with its host. OSError:
    `run_dir` is missing or cannot be written, or its file system has no locks. A `.lock` that is a link or no regular
    file, as in a folder of others, is refused.
    """
    path = run_dir / ".lock"
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is no regular file: remove it")
    with os.fdopen(descriptor, "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise ValueError(
                f"{run_dir} is in use by {file.read(200) or 'another process'}: stop that training first "
                "(SIGTERM makes it save and end) or choose another run_dir"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
