"""Share a secret among the ranks of a run, with the standard library alone; with it they authenticate each other."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

# The folder of the rendezvous of a local launch; no other user can enter it.
RENDEZVOUS_VARIABLE = "BD3_SCALE_RENDEZVOUS"
# For other launches: the secret's file, on storage that all ranks share. Default: a file in the run directory.
SECRET_VARIABLE = "BD3_SCALE_SECRET"
SECRET_FILE = ".secret"
_BYTES = 32


def shared_secret(path: Path) -> bytes:
    """Return the 32 bytes of `path`. The first process makes the file; all processes read the same bytes.

    Raises:
        ValueError: the file belongs to another user, others can read it, or its size is wrong. OSError: it cannot be
        read or made.
    """
    if not path.exists():
        _make(path)
    # O_NOFOLLOW: a link fails with ELOOP ("too many levels of symbolic links").
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise ValueError(
                f"{path} must be a file that only its user can read (mode 0600): remove it, or name another file "
                f"with {SECRET_VARIABLE}=FILE"
            )
        secret = file.read(_BYTES + 1)
    if len(secret) != _BYTES:
        raise ValueError(f"{path} must hold {_BYTES} bytes and does not: remove it; it is then made again")
    return secret


def _make(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_BYTES))
            file.flush()
            os.fsync(descriptor)
        # A link appears with its content complete, and fails if another process was first. A rename would replace the
        # secret that other ranks have already read.
        with contextlib.suppress(FileExistsError):
            os.link(partial, path)
    finally:
        partial.unlink(missing_ok=True)
