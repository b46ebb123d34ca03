"""MosaicML streaming as this package needs it; every import of it goes through here.

Three things are changed. It imports without transformers and torchvision; what the processes of a node share lies in
files of a folder that goes with the first of them, in place of POSIX shared memory under names that anybody may take;
and how a column is encoded is read from its name once, not for every sample.
"""

from __future__ import annotations

import atexit
import fcntl
import functools
import importlib
import mmap
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import torch.distributed as dist

from bd3_scale.parallel.collective import gather_values
from bd3_scale.resilience.leftovers import temporary_folder, try_lock

CACHE_LOCK_SECONDS = 15.0  # the loader workers of a killed run end within one

_OPEN = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

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
import streaming.base.format.mds.encodings as streaming_encodings  # noqa: E402
import streaming.base.shared.array as streaming_array  # noqa: E402
from streaming import MDSWriter, Stream, StreamingDataset  # noqa: E402
from streaming.base.format import reader_from_json  # noqa: E402
from streaming.base.format.mds.encodings import mds_decode  # noqa: E402
from streaming.base.hashing import get_hash  # noqa: E402
from streaming.base.shared.array import SharedArray  # noqa: E402
from streaming.base.shuffle import get_shuffle  # noqa: E402
from streaming.base.storage.download import CloudDownloader  # noqa: E402
from streaming.base.world import World  # noqa: E402

__all__ = [
    "CloudDownloader",
    "Lock",
    "MDSWriter",
    "SharedArray",
    "Stream",
    "StreamingDataset",
    "get_hash",
    "get_shuffle",
    "mds_decode",
    "reader_from_json",
]


_PROCESS = ExitStack()
atexit.register(_PROCESS.close)


def _claim_prefix(folders: Sequence[str], remotes: Sequence[str | None], world: World) -> tuple[int, Any]:
    """Return the number that the names of a data set's shared memory begin with, after a folder for them was agreed on.

    Streaming counts up to the first number that is free: two runs that start together can meet there, it cannot tell
    the memory that a killed run left behind from that of a living one, and a full or small /dev/shm is a SIGBUS. Here
    the first rank of the node makes a folder of its own in the temporary one, where no other run looks, and which goes
    with that rank or, if it is killed, with whoever comes next.
    """
    claim, problem = "", ""
    if world.is_local_leader:
        try:
            for folder, remote in zip(folders, remotes, strict=True):
                if remote is not None:
                    _lock_cache(Path(folder))
            claim = str(_PROCESS.enter_context(temporary_folder("data")))
        except (ValueError, OSError) as error:
            problem = str(error)
    if dist.is_initialized():
        claim, problem = gather_values([claim, problem])[world.rank - world.rank_of_node]
    if problem:
        raise ValueError(problem)
    streaming_array.SharedMemory = functools.partial(_SharedFile, Path(claim))
    streaming_dataset.gettempdir = functools.partial(str, claim)
    return 0, None


class _SharedFile:
    """Memory that processes share by mapping the same file of `folder`, in place of streaming's `SharedMemory`."""

    def __init__(self, folder: Path, name: str, size: int) -> None:
        descriptor = os.open(folder / name, _OPEN, 0o600)
        try:
            # Whoever writes waits for the file to have its size and room on the disk: without, that would be a SIGBUS.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_size < size:
                os.posix_fallocate(descriptor, 0, size)
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # the mapping keeps a copy of the descriptor
            self.buf = mmap.mmap(descriptor, size)
        except OSError as error:
            way_out = "make room there, or set TMPDIR to another folder"
            raise OSError(error.errno, f"{error.strerror}; {way_out}", str(folder / name)) from error
        finally:
            os.close(descriptor)


class Lock:
    """A lock among the processes of a node, in place of the `FileLock` that streaming takes.

    That one would make the folder of a run again which has just ended.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._descriptor = -1

    def acquire(self) -> None:
        descriptor = os.open(self._path, _OPEN, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        self._descriptor = descriptor

    def release(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


streaming_dataset.get_shm_prefix = _claim_prefix
streaming_dataset.FileLock = Lock
streaming_encodings._get_coder = functools.cache(streaming_encodings._get_coder)


def _lock_cache(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", _OPEN, 0o600)  # stays open, and so locked, until the process ends
    deadline = time.monotonic() + CACHE_LOCK_SECONDS
    while not try_lock(descriptor):
        if time.monotonic() > deadline:
            os.close(descriptor)
            raise ValueError(
                f"the cache {folder} is in use by another run or node; give every run its own folder (data.path), on "
                f"a disk of the node"
            )
        time.sleep(0.1)
