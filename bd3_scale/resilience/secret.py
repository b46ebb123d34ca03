"""The secret by which the ranks of a run know each other, with the standard library alone."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

# The folder in which the ranks of a local launch meet; nobody else can enter it.
MEETING_VARIABLE = "BD3_SCALE_MEETING"
# A file that all ranks of another launch see, where it is not to be the run directory's.
SECRET_VARIABLE = "BD3_SCALE_SECRET"
SECRET_FILE = ".secret"
_BYTES = 32


def shared_secret(path: Path) -> bytes:
    """Return the 32 bytes that `path` holds. Whoever comes first makes the file; all processes read the same.

    Raises:
        ValueError: the file is another user's, others can read it, or it holds something else. OSError: it cannot be
        read or made.
    """
    if not path.exists():
        _make(path)
    # Of a link, the kernel says that there are too many.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise ValueError(
                f"{path} must be a file that its user alone can read (mode 0600): remove it, or name another place "
                f"with {SECRET_VARIABLE}=FILE"
            )
        secret = file.read(_BYTES + 1)
    if len(secret) != _BYTES:
        raise ValueError(f"{path} must hold {_BYTES} bytes and does not: remove it, and it is made anew")
    return secret


def _make(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_BYTES))
            file.flush()
            os.fsync(descriptor)
        # Whole when it appears, and the first one stays: a rename would replace what others have read.
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    finally:
        aside.unlink(missing_ok=True)
