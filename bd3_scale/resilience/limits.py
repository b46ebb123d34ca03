"""Check the limits of a process (ulimit) and explain errors that come from them; needs the standard library alone."""

from __future__ import annotations

import errno
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager

# A single rank has about 90 files open, most of them gloo's sockets, and every other rank adds some.
MIN_OPEN_FILES = 128
WANTED_OPEN_FILES = 65536
# With less, gloo's threads cannot start, and the rank hangs without an error.
MIN_ADDRESS_SPACE = 4 << 30

_TOO_MANY_FILES = re.compile(r"too many open files", re.IGNORECASE)
_REQUESTED_OF_GPU = re.compile(r"Tried to allocate ([\d.]+ \w+)")
_GPU_CAPACITY = re.compile(r"total capacity of ([\d.]+ \w+)")
_NO_MEMORY = re.compile(r"cannot allocate memory|can't allocate memory|failed to map segment|can't start new thread")


def check_limits() -> None:
    """Raise the limit of open files as far as allowed, and check that the limits suffice for a rank.

    Raises:
        ValueError: they do not; the message says which `ulimit` to change.
    """
    soft, hard = (_finite(limit) for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
    if soft < (wanted := min(hard, WANTED_OPEN_FILES)):
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(wanted), resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    if hard < MIN_OPEN_FILES:
        raise ValueError(_too_few_files())
    if _address_space() < MIN_ADDRESS_SPACE:
        raise ValueError(_too_little_address_space())


def exhausted_limit(error: BaseException) -> str | None:
    """Return one line with the process or GPU limit that caused an error and the way out, or None for other errors."""
    number, text = getattr(error, "errno", None), str(error)
    if type(error).__name__ == "OutOfMemoryError":
        return _too_little_gpu_memory(text)
    if number == errno.EMFILE or _TOO_MANY_FILES.search(text):
        return _too_few_files()
    lacks_memory = isinstance(error, MemoryError) or number == errno.ENOMEM or _NO_MEMORY.search(text)
    return _too_little_address_space() if lacks_memory and _address_space() < float("inf") else None


def _too_few_files() -> str:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return f"this process may have {limit} files open (ulimit -n), which is too few: set it to {WANTED_OPEN_FILES}"


def _too_little_address_space() -> str:
    return (
        f"this process may have {_address_space() / 2**30:.1f} GiB of address space (ulimit -v), which is too little: "
        "set it to unlimited, and limit memory in another way, such as a cgroup or SLURM's --mem"
    )


def _too_little_gpu_memory(text: str) -> str:
    requested, capacity = _REQUESTED_OF_GPU.search(text), _GPU_CAPACITY.search(text)
    memory = f"memory of {capacity[1]}" if capacity else "memory"
    when = f" when {requested[1]} are requested" if requested else ""
    return (
        f"the GPU is out of {memory}{when}: set train.recompute=full, a smaller train.micro_batch_size, or more "
        "parallel.tensor, parallel.pipeline or parallel.zero_stage; an unchanged restart would fail again; "
        "`bd3-scale plan` predicts what fits"
    )


def _address_space() -> float:
    return _finite(resource.getrlimit(resource.RLIMIT_AS)[0])


def _finite(limit: int) -> float:
    return float("inf") if limit == resource.RLIM_INFINITY else limit


@contextmanager
def limited_memory(num_bytes: int) -> Iterator[None]:
    """Limit this process to `num_bytes` more address space than it has now, inside the block.

    For libraries that read untrusted files: when a library asks for more, the kernel refuses, and most libraries then
    raise MemoryError, where the machine would otherwise run out of memory.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        limit = int(file.read().split()[0]) * resource.getpagesize() + num_bytes
    resource.setrlimit(resource.RLIMIT_AS, (int(min(limit, _finite(soft))), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
