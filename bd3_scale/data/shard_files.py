"""Keep the shard files of a split on one machine: fetch them when needed, and remove others if the cache is full."""

from __future__ import annotations

import atexit
import fcntl
import functools
import mmap
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

from bd3_scale.data.index import INDEX_FILE, SHARD_LIMIT, Shard, ShardFile, ShardTable, shard_names
from bd3_scale.data.remote import DamagedError, check_downloaded, with_retries
from bd3_scale.parallel.collective import on_first_of_node
from bd3_scale.resilience.leftovers import locked_folder, temporary_folder, try_lock
from bd3_scale.resilience.readers import read_regular

CACHE_LOCK_SECONDS = 15.0  # loader workers of a killed run, which may still hold the lock, end within one second

_ABSENT, _FETCHING, _PRESENT = range(3)
_POLL_SECONDS = 0.007
_NAME = re.compile(r"shard\.(\d{5,9})\.mds(\.zstd)?")
_OPEN = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# Arrays with one number for each shard, which all processes of a machine share.
_ARRAYS = {"states": np.uint8, "used": np.int64, "downloads": np.uint32, "read": np.bool_}

_PROCESS = ExitStack()
atexit.register(_PROCESS.close)


class ShardFiles:
    """The files of the shards in `table`, in `folder`, for all processes of a machine.

    remote: the storage to fetch from; None: all shards are in `folder`, packed, and are unpacked into it.
    limit: bytes that shards and index may take; only with a remote. retry_minutes: see `with_retries`.

    Collective over all ranks at construction. Raises FileNotFoundError: a shard is missing; ValueError: the limit is
    too small, or another run uses the folder as its cache.
    """

    def __init__(
        self, folder: Path, table: ShardTable, *, remote: str | None, limit: float | None, retry_minutes: float
    ) -> None:
        self.folder, self._table, self._remote, self._retry_minutes = folder, table, remote, retry_minutes
        rows = table.rows
        self._max_bytes = rows["raw_bytes"].astype(np.int64) + rows["zip_bytes"]
        self._limit = float("inf") if remote is None or limit is None else limit
        self.shared_folder = Path(on_first_of_node(self._set_up))
        self._states, self._used, self._downloads, self._read, self._usage = self._arrays()
        # Own to each process, and locked: some downloaders cannot be shared between threads or used after a fork.
        self._one_by_one = threading.Lock()
        self._client: tuple[int, Any] = (0, None)

    @property
    def downloads_per_shard(self) -> float | None:
        """Return downloads so far, divided by the number of shards that were fetched or read; None before the first.

        1 means that every shard came once; more means that the cache is smaller than what is in use at a time.
        """
        touched = int(((self._downloads > 0) | self._read).sum())
        return int(self._downloads.sum()) / touched if touched else None

    def unpacked(self, number: int) -> Path:
        """Return the path of a shard's unpacked file."""
        return self.folder / shard_names(number)[0]

    def is_absent(self, number: int) -> bool:
        """Return whether a shard is neither here nor being fetched by a process of the machine."""
        return bool(self._states[number] == _ABSENT)

    def note_use(self, number: int) -> None:
        """Note that a shard was read just now: the one that was not read for longest is removed first."""
        self._used[number] = time.time_ns()
        self._read[number] = True

    def prepare(self, number: int, *, waits: bool = True) -> None:
        """Make a shard available, unpacked and verified; if another process is doing that, wait for it if `waits`.

        Raises as `with_retries`; DamagedError: the file is not what the index says.
        """
        # Only one process may fetch a shard. It sets the state under the lock, fetches without it, and the others poll.
        while True:
            with self._locked():
                state = self._states[number]
                if state == _PRESENT and self.unpacked(number).is_file():
                    self._used[number] = time.time_ns()
                    return
                if state != _FETCHING:
                    if state == _ABSENT:
                        self._evict_to(self._limit - int(self._max_bytes[number]))
                    self._states[number] = _FETCHING
                    break
            if not waits:
                return
            time.sleep(_POLL_SECONDS)
        try:
            added = self._fetch(self._table[number])
        except BaseException:
            # Otherwise all other processes would wait for this shard without end.
            self._states[number] = state
            raise
        with self._locked():
            self._usage[0] += added
            self._used[number] = time.time_ns()
            self._states[number] = _PRESENT

    def repair(self, number: int, is_damaged: Any) -> None:
        """Unpack or fetch a shard again whose file is damaged, unless another process has done so."""
        with self._locked():
            if self._states[number] == _PRESENT and is_damaged():
                self.unpacked(number).unlink()
                self._usage[0] -= int(self._table.rows["raw_bytes"][number])
        self.prepare(number)

    def make_room(self, unused_since: int) -> bool:
        """Remove shards that no process has used since `unused_since` (`time.time_ns`) until two more fit.

        Two, because another thread may fetch one at the same time. Return whether they fit.
        """
        most = self._limit - 2 * int(self._max_bytes.max())
        with self._locked():
            while self._usage[0] > most:
                present = self._states == _PRESENT
                if self._used[present].min(initial=unused_since) >= unused_since:
                    return False
                self._evict()
        return True

    def _evict_to(self, most: float) -> None:
        while self._usage[0] > most:
            self._evict()

    def _evict(self) -> None:
        """Remove the shard that was not used for longest."""
        present = np.flatnonzero(self._states == _PRESENT)
        if not len(present):
            raise ValueError(f"{self.folder} has no room for a shard, and none to remove: raise data.cache_limit")
        number = int(present[self._used[present].argmin()])
        self._states[number] = _ABSENT
        for name, kind in zip(shard_names(number), ("raw_bytes", "zip_bytes"), strict=True):
            file = self.folder / name
            if file.exists():
                file.unlink()
                self._usage[0] -= int(self._table.rows[kind][number])

    def _fetch(self, shard: Shard) -> int:
        """Make a shard available, unpacked; return by how many bytes the folder has grown."""
        if (self.folder / shard.raw_data.basename).is_file():
            return 0
        if self._remote is None:
            self._unpack(shard)
        else:
            place = os.path.join(self._remote, shard.stored.basename)
            with self._one_by_one:
                with_retries(functools.partial(self._unpack, shard), place, self._retry_minutes)
        return shard.raw_data.bytes

    def _unpack(self, shard: Shard) -> None:
        """Put a shard's unpacked file into the folder. DamagedError: the stored file is not what the index says."""
        with locked_folder(self.folder, ".unpacking.") as scratch:
            packed = self._stored_file(shard, scratch)
            try:
                content = _verified(packed, shard.stored)
                if shard.zip_data is not None:
                    content = _unpacked(content)
            except (ValueError, zstandard.ZstdError) as error:
                file = self.folder / packed.name
                raise DamagedError(
                    f"{file} is damaged: {error}; copy {os.path.join(self._remote or self.folder, packed.name)} again "
                    f"or prepare the data again"
                ) from error
            (scratch / "shard").write_bytes(content)
            os.replace(scratch / "shard", self.folder / shard.raw_data.basename)

    def _stored_file(self, shard: Shard, scratch: Path) -> Path:
        """Return a shard's file as stored; one of a remote is downloaded into `scratch`."""
        name = shard.stored.basename
        if self._remote is None:
            return self.folder / name
        place, client = os.path.join(self._remote, name), self._downloader()
        try:
            client.download(place, str(scratch / name))
        except BaseException:
            client.clean_up()
            raise
        check_downloaded(place, scratch / name)
        # Without a lock: only the process that set the shard's state to _FETCHING is here.
        self._downloads[int(name.split(".")[1])] += 1
        return scratch / name

    def _downloader(self) -> Any:
        from bd3_scale.data.mosaicml import CloudDownloader

        if self._client[0] != os.getpid():
            self._client = os.getpid(), CloudDownloader.get(self._remote)
        return self._client[1]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock the states of the shards against the other processes and threads of the machine."""
        descriptor = os.open(self.shared_folder / "lock", _OPEN, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _set_up(self) -> str:
        """Initialise the shared arrays for all processes of the machine; return their folder.

        It is removed with this process or, if that is killed, by the next one. It is not POSIX shared memory: anybody
        may take a name there, so two runs that start together could collide, and a full /dev/shm would be a SIGBUS.
        """
        if self._remote is not None:
            _lock_cache(self.folder)
        states, usage = self._present_files()
        self.shared_folder = _PROCESS.enter_context(temporary_folder("data"))
        arrays = self._arrays()
        arrays[0][:] = states
        arrays[1][:] = time.time_ns()
        arrays[4][0] = usage
        return str(self.shared_folder)

    def _arrays(self) -> list[NDArray[Any]]:
        """Return the arrays of `_ARRAYS`, one number for each shard, and the bytes that the folder takes."""
        sizes = {name: (np.dtype(kind), len(self._table)) for name, kind in _ARRAYS.items()}
        sizes["usage"] = (np.dtype(np.int64), 1)
        return [_shared(self.shared_folder / name, kind, number) for name, (kind, number) in sizes.items()]

    def _present_files(self) -> tuple[NDArray[np.uint8], int]:
        """Return the state of each shard, and the bytes that shards and index take."""
        present = {kind: np.zeros(len(self._table), np.bool_) for kind in ("raw", "zip")}
        for match in filter(None, map(_NAME.fullmatch, os.listdir(self.folder))):
            if (number := int(match[1])) < len(self._table):
                present["zip" if match[2] else "raw"][number] = True
        index = (self.folder / INDEX_FILE).stat().st_size
        if self._remote is None:
            self._check_complete(present)
        else:
            self._check_limit(index)
            # An earlier version left packed files if it was killed while it unpacked.
            for number in np.flatnonzero(present["zip"]).tolist():
                (self.folder / shard_names(number)[1]).unlink()
            present["zip"][:] = False
        size = sum(int(self._table.rows[f"{kind}_bytes"][which].sum(dtype=np.int64)) for kind, which in present.items())
        return np.where(present["raw"] | present["zip"], _PRESENT, _ABSENT).astype(np.uint8), index + size

    def _check_complete(self, present: dict[str, NDArray[np.bool_]]) -> None:
        first = self._table[0]
        for number in np.flatnonzero(~present["zip" if first.zip_data else "raw"])[:1].tolist():
            name = self._table[number].stored.basename
            raise FileNotFoundError(f"{self.folder / name} is missing; copy the data again")

    def _check_limit(self, index: int) -> None:
        least = index + 4 * int(self._max_bytes.max())
        if self._limit < least:
            raise ValueError(
                f"data.cache_limit is {self._limit:,.0f} bytes; it must hold the index of {self.folder} ({index:,} "
                f"bytes) and four shards as packed and unpacked: set it to at least {-(-least // 2**20)}mb"
            )


def _verified(file: Path, indexed: ShardFile) -> bytes:
    content = read_regular(file, indexed.bytes)
    if xxhash.xxh64_hexdigest(content) != indexed.hashes.xxh64:
        raise ValueError(f"it does not match its hash in {INDEX_FILE}")
    return content


def _unpacked(packed: bytes) -> bytes:
    # Checked before unpacking: a few kilobytes could otherwise fill the memory.
    if not 0 <= (size := zstandard.frame_content_size(packed)) <= SHARD_LIMIT:
        raise ValueError(f"it would unpack to {size / 2**20:g} MiB, which no shard has")
    return zstandard.ZstdDecompressor().decompress(packed)


def _shared(file: Path, kind: np.dtype[Any], number: int) -> NDArray[Any]:
    """Return an array in a file, memory-mapped and so shared between processes; new files hold zeros."""
    descriptor = os.open(file, _OPEN, 0o600)
    size = max(1, number * kind.itemsize)
    try:
        # Allocated now: if the disk were full, writing to the mapping later would raise SIGBUS, which kills.
        if os.fstat(descriptor).st_size < size:
            os.posix_fallocate(descriptor, 0, size)
        return np.frombuffer(mmap.mmap(descriptor, size), kind, number)  # the mapping keeps a copy of the descriptor
    except OSError as error:
        way_out = "make room there, or set TMPDIR to another folder"
        raise OSError(error.errno, f"{error.strerror}; {way_out}", str(file)) from error
    finally:
        os.close(descriptor)


def _lock_cache(folder: Path) -> None:
    """Lock the cache folder for this process. ValueError: another run or node uses it."""
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
