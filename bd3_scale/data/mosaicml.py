"""MosaicML streaming as this package needs it; every import of it goes through here.

Two things are changed. It imports without transformers and torchvision, and its shared memory has an owner.
"""

from __future__ import annotations

import errno
import fcntl
import importlib
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch.distributed as dist

from bd3_scale.parallel.collective import gather_values

SHARED_MEMORY = Path("/dev/shm")
OWNER_SUFFIX = "_bd3_scale.lock"
CACHE_LOCK_SECONDS = 15.0  # the loader workers of a killed run end within 5 (torch's MP_STATUS_CHECK_INTERVAL)

_KINDS_OF_BATCHES = {
    "transformers.feature_extraction_utils": "BatchFeature",
    "transformers.tokenization_utils_base": "BatchEncoding",
}


def _import_streaming() -> None:
    """Import streaming without its ready-made data sets of text and images, and without transformers.

    Nothing here uses them, and they import transformers and torchvision: seconds at every start, and a failure where
    torchvision is broken, as a CUDA build of it beside a torch for CPU is. Streaming's own loader tells two kinds of
    batches of transformers from others; where transformers was not there before, it does not know them.
    """
    names = ["streaming.multimodal", "streaming.text", "streaming.vision"]
    if "transformers" not in sys.modules:
        names += ["transformers", *_KINDS_OF_BATCHES]
    left_out = {name: ModuleType(name) for name in names if name not in sys.modules}
    for name in left_out.keys() & _KINDS_OF_BATCHES:
        setattr(left_out[name], _KINDS_OF_BATCHES[name], type(_KINDS_OF_BATCHES[name], (), {}))
    sys.modules |= left_out
    streaming = importlib.import_module("streaming")
    for name in left_out:
        del sys.modules[name]
        vars(streaming).pop(name.removeprefix("streaming."), None)


_import_streaming()

import streaming.base.dataset as streaming_dataset  # noqa: E402
from streaming import MDSWriter, Stream, StreamingDataset  # noqa: E402
from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, SHM_TO_CLEAN  # noqa: E402
from streaming.base.hashing import get_hash  # noqa: E402
from streaming.base.shuffle import get_shuffle  # noqa: E402
from streaming.base.storage.download import CloudDownloader  # noqa: E402
from streaming.base.world import World  # noqa: E402

__all__ = ["CloudDownloader", "MDSWriter", "Stream", "StreamingDataset", "get_hash", "get_shuffle"]


def _claim_prefix(folders: Sequence[str], remotes: Sequence[str | None], world: World) -> tuple[int, Any]:
    """The number that the names of a data set's shared memory begin with, on every rank of a node the same.

    Streaming counts up to the first number that is free: two runs that start together can meet there, and it cannot
    tell the memory that a killed run left behind from that of a living one. Here a number is drawn at random, and its
    owner, the first rank of the node, holds a lock on a file beside the memory. The kernel drops the lock when the
    owner and its loader workers are gone; whoever comes next removes what is left.
    """
    claim, problem = -1, ""
    if world.is_local_leader:
        try:
            for folder, remote in zip(folders, remotes, strict=True):
                if remote is not None:
                    _lock_cache(Path(folder))
            _remove_left_behind()
            claim = _own_new_prefix()
        except (ValueError, OSError) as error:
            problem = str(error)
    if dist.is_initialized():
        claim, problem = gather_values([claim, problem])[world.rank - world.rank_of_node]
    if problem:
        raise ValueError(problem)
    return claim, None


streaming_dataset.get_shm_prefix = _claim_prefix


def _own_new_prefix() -> int:
    prefix = secrets.randbits(48)
    lock = SHARED_MEMORY / f"{prefix:06}{OWNER_SUFFIX}"
    # Locked before it has its name, or another run could take it for one whose owner is gone.
    aside = lock.with_suffix(".new")
    fd = os.open(aside, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)  # stays open, and so locked, until the process ends
    fcntl.flock(fd, fcntl.LOCK_EX)
    aside.rename(lock)
    return prefix


def _remove_left_behind() -> None:
    for lock in SHARED_MEMORY.glob(f"*{OWNER_SUFFIX}"):
        try:
            fd = os.open(lock, os.O_RDWR)
        except (FileNotFoundError, PermissionError):  # another run removed it; another user's
            continue
        try:
            if _try_lock(fd):
                prefix = lock.name.removesuffix(OWNER_SUFFIX)
                for name in SHM_TO_CLEAN:
                    (SHARED_MEMORY / f"{prefix}_{name}").unlink(missing_ok=True)
                for name in (BARRIER_FILELOCK, CACHE_FILELOCK):
                    Path(tempfile.gettempdir(), f"{prefix}_{name}").unlink(missing_ok=True)
                lock.unlink(missing_ok=True)
        finally:
            os.close(fd)


def _lock_cache(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o600)  # held like the owner's
    deadline = time.monotonic() + CACHE_LOCK_SECONDS
    while not _try_lock(fd):
        if time.monotonic() > deadline:
            os.close(fd)
            raise ValueError(
                f"the cache {folder} is in use by another run or node; give every run its own folder (data.path), on "
                f"a disk of the node"
            )
        time.sleep(0.1)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno != errno.EWOULDBLOCK:
            raise
        return False
    return True
