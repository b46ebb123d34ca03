"""What a shell, a site (ulimit) or a GPU lets a process have; standard library alone."""

from __future__ import annotations

import errno
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager

# A rank that is alone has about 90 files open, gloo's sockets most of them, and every other rank adds some.
LEAST_FILES = 128
ENOUGH_FILES = 65536
# Below, the threads of gloo cannot start, and the rank hangs.
LEAST_ADDRESS_SPACE = 4 << 30

_TOO_MANY_FILES = re.compile(r"too many open files", re.IGNORECASE)
_ASKED_OF_GPU = re.compile(r"Tried to allocate ([\d.]+ \w+)")
_GPU_HAS = re.compile(r"total capacity of ([\d.]+ \w+)")
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
    """Return in one line which limit of this process or its GPU an error comes from, and the way out, or None."""
    number, text = getattr(error, "errno", None), str(error)
    if type(error).__name__ == "OutOfMemoryError":
        return _too_little_gpu_memory(text)
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


def _too_little_gpu_memory(text: str) -> str:
    asked, has = _ASKED_OF_GPU.search(text), _GPU_HAS.search(text)
    memory = f"memory of {has[1]}" if has else "memory"
    when = f" when {asked[1]} are asked for" if asked else ""
    return (
        f"the GPU is out of {memory}{when}: set train.recompute=full, a smaller train.micro_batch_size, or more "
        "parallel.tensor, parallel.pipeline or parallel.zero_stage; another try of the same would end alike, and "
        "`bd3-scale plan` predicts what fits"
    )


def _address_space() -> float:
    return _finite(resource.getrlimit(resource.RLIMIT_AS)[0])


def _finite(limit: int) -> float:
    return float("inf") if limit == resource.RLIM_INFINITY else limit


@contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """Give this process no more than `num_bytes` of address space beyond what it has, inside the block.

    A library that is about to take more gets none from the system, and most then raise MemoryError.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        limit = int(file.read().split()[0]) * resource.getpagesize() + num_bytes
    resource.setrlimit(resource.RLIMIT_AS, (int(min(limit, _finite(soft))), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
