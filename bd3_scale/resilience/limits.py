"""What a shell or a site lets a process have (ulimit), looked at before hours are spent; standard library alone."""

from __future__ import annotations

import errno
import re
import resource

# A rank that is alone has about 90 files open, gloo's sockets most of them, and every other rank adds some.
LEAST_FILES = 128
ENOUGH_FILES = 65536
# Below, the threads of gloo cannot start, and the rank hangs.
LEAST_ADDRESS_SPACE = 4 << 30

_TOO_MANY_FILES = re.compile(r"too many open files", re.IGNORECASE)
_NO_MEMORY = re.compile(r"cannot allocate memory|can't allocate memory|failed to map segment|can't start new thread")


def check_limits() -> None:
    """Let this process open as many files as it may, and see whether its limits leave a rank room.

    Raises:
        ValueError: they do not.
    """
    soft, hard = (_finite(limit) for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
    if soft < (wanted := min(hard, ENOUGH_FILES)):
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(wanted), resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    if hard < LEAST_FILES:
        raise ValueError(_too_few_files())
    if _address_space() < LEAST_ADDRESS_SPACE:
        raise ValueError(_too_little_address_space())


def exhausted(error: BaseException) -> str | None:
    """Return in one line which limit of this process an error comes from, and the way out; None: from none."""
    number, text = getattr(error, "errno", None), str(error)
    if number == errno.EMFILE or _TOO_MANY_FILES.search(text):
        return _too_few_files()
    lacks_memory = isinstance(error, MemoryError) or number == errno.ENOMEM or _NO_MEMORY.search(text)
    return _too_little_address_space() if lacks_memory and _address_space() < float("inf") else None


def _too_few_files() -> str:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return f"this process may have {limit} files open (ulimit -n), which is too few: set it to {ENOUGH_FILES}"


def _too_little_address_space() -> str:
    return (
        f"this process may have {_address_space() / 2**30:.1f} GiB of address space (ulimit -v), which is too little: "
        "set it to unlimited, and bound memory otherwise, as with a cgroup or SLURM's --mem"
    )


def _address_space() -> float:
    return _finite(resource.getrlimit(resource.RLIMIT_AS)[0])


def _finite(limit: int) -> float:
    return float("inf") if limit == resource.RLIM_INFINITY else limit
