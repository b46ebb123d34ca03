"""The files of a split's shards on one machine: which are here, fetched when they are needed, removed for others."""

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
from bd3_scale.data.remote import DamagedError, check_came, patiently
from bd3_scale.parallel.collective import on_first_of_node
from bd3_scale.resilience.leftovers import locked_folder, temporary_folder, try_lock
from bd3_scale.resilience.readers import read_regular

CACHE_LOCK_SECONDS = 15.0  # the loader workers of a killed run end within one

_AWAY, _COMING, _HERE = range(3)
_LOOK_SECONDS = 0.007
_NAME = re.compile(r"shard\.(\d{5,9})\.mds(\.zstd)?")
_OPEN = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# One number a shard, which all processes of a machine share.
_ARRAYS = {"states": np.uint8, "used": np.int64, "downloads": np.uint32, "read": np.bool_}

_PROCESS = ExitStack()
atexit.register(_PROCESS.close)


class ShardFiles:
    """The files of the shards that `table` lists, in `folder`, for all processes of a machine.

    remote: where they are fetched from; None: all of them are in `folder`, packed, and are unpacked beside themselves.
    limit: bytes that they and the index take at most; only with a remote. retry_minutes: see `patiently`.

    Collective over all ranks at construction. Raises FileNotFoundError: a shard is missing; ValueError: the limit is
    too small, or another run uses the folder as its cache.
    """

    def __init__(
        self, folder: Path, table: ShardTable, *, remote: str | None, limit: float | None, retry_minutes: float
    ) -> None:
        self.folder, self._table, self._remote, self._retry_minutes = folder, table, remote, retry_minutes
        rows = table.rows
        self._most_bytes = rows["raw_bytes"].astype(np.int64) + rows["zip_bytes"]
        self._limit = float("inf") if remote is None or limit is None else limit
        self.shared_folder = Path(on_first_of_node(self._set_up))
        self._states, self._used, self._downloads, self._read, self._usage = self._arrays()
        # Of this process: not every downloader can be used by two threads, or after a fork.
        self._one_by_one = threading.Lock()
        self._client: tuple[int, Any] = (0, None)

    @property
    def downloads_per_shard(self) -> float | None:
        """Return the downloads so far over the shards that were fetched or read; None before the first.

        It is 1 where every shard came once; above, the cache is smaller than what is in use at a time.
        """
        touched = int(((self._downloads > 0) | self._read).sum())
        return int(self._downloads.sum()) / touched if touched else None

    def unpacked(self, number: int) -> Path:
        """Return where a shard lies once it is prepared."""
        return self.folder / shard_names(number)[0]

    def is_away(self, number: int) -> bool:
        """Return whether a shard is not here, and nobody on the machine is fetching it."""
        return bool(self._states[number] == _AWAY)

    def note_use(self, number: int) -> None:
        """Tell that a shard was read just now: what was not read for longest goes first."""
        self._used[number] = time.time_ns()
        self._read[number] = True

    def prepare(self, number: int, *, waits: bool = True) -> None:
        """Have a shard here, unpacked and as its index says; where another process is at it, wait or leave it to that.

        Raises as `patiently` does; DamagedError: it is not what the index says.
        """
        while True:
            with self._locked():
                state = self._states[number]
                if state == _HERE and self.unpacked(number).is_file():
                    self._used[number] = time.time_ns()
                    return
                if state != _COMING:
                    if state == _AWAY:
                        self._make_way(self._limit - int(self._most_bytes[number]))
                    self._states[number] = _COMING
                    break
            if not waits:
                return
            time.sleep(_LOOK_SECONDS)
        try:
            added = self._fetch(self._table[number])
        except BaseException:
            # Else every other process would wait for it for ever.
            self._states[number] = state
            raise
        with self._locked():
            self._usage[0] += added
            self._used[number] = time.time_ns()
            self._states[number] = _HERE

    def prepare_anew(self, number: int, is_damaged: Any) -> None:
        """Unpack or fetch a shard again of which the file is damaged, unless another process was first."""
        with self._locked():
            if self._states[number] == _HERE and is_damaged():
                self.unpacked(number).unlink()
                self._usage[0] -= int(self._table.rows["raw_bytes"][number])
        self.prepare(number)

    def make_room(self, unused_since: int) -> bool:
        """Remove shards that nobody on the machine has used since then, in `time.time_ns`, until two more fit, so that
        another thread can fetch one, too; return whether they do.
        """
        most = self._limit - 2 * int(self._most_bytes.max())
        with self._locked():
            while self._usage[0] > most:
                here = self._states == _HERE
                if self._used[here].min(initial=unused_since) >= unused_since:
                    return False
                self._remove_coldest()
        return True

    def _make_way(self, most: float) -> None:
        while self._usage[0] > most:
            self._remove_coldest()

    def _remove_coldest(self) -> None:
        here = np.flatnonzero(self._states == _HERE)
        if not len(here):
            raise ValueError(f"{self.folder} has no room for a shard, and none to remove: raise data.cache_limit")
        number = int(here[self._used[here].argmin()])
        self._states[number] = _AWAY
        for name, kind in zip(shard_names(number), ("raw_bytes", "zip_bytes"), strict=True):
            file = self.folder / name
            if file.exists():
                file.unlink()
                self._usage[0] -= int(self._table.rows[kind][number])

    def _fetch(self, shard: Shard) -> int:
        """Have a shard here, unpacked; return by how many bytes the folder has grown."""
        if (self.folder / shard.raw_data.basename).is_file():
            return 0
        if self._remote is None:
            self._unpack(shard)
        else:
            place = os.path.join(self._remote, shard.stored.basename)
            with self._one_by_one:
                patiently(functools.partial(self._unpack, shard), place, self._retry_minutes)
        return shard.raw_data.bytes

    def _unpack(self, shard: Shard) -> None:
        """Put a shard's unpacked bytes into the folder. DamagedError: they are not what the index says."""
        with locked_folder(self.folder, ".unpacking.") as aside:
            packed = self._downloaded(shard, aside)
            try:
                content = _as_indexed(packed, shard.stored)
                if shard.zip_data is not None:
                    content = _unpacked(content)
            except (ValueError, zstandard.ZstdError) as error:
                file = self.folder / packed.name
                raise DamagedError(
                    f"{file} is damaged: {error}; copy {os.path.join(self._remote or self.folder, packed.name)} again "
                    f"or prepare the data anew"
                ) from error
            (aside / "shard").write_bytes(content)
            os.replace(aside / "shard", self.folder / shard.raw_data.basename)

    def _downloaded(self, shard: Shard, aside: Path) -> Path:
        """Return a shard's file as stored, in `aside` where it comes from a remote."""
        name = shard.stored.basename
        if self._remote is None:
            return self.folder / name
        place, client = os.path.join(self._remote, name), self._downloader()
        try:
            client.download(place, str(aside / name))
        except BaseException:
            client.clean_up()
            raise
        check_came(place, aside / name)
        # Nobody else counts here: a shard is prepared by one at a time.
        self._downloads[int(name.split(".")[1])] += 1
        return aside / name

    def _downloader(self) -> Any:
        from bd3_scale.data.mosaicml import CloudDownloader

        if self._client[0] != os.getpid():
            self._client = os.getpid(), CloudDownloader.get(self._remote)
        return self._client[1]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep the other processes and threads of the machine from changing which shards are here."""
        descriptor = os.open(self.shared_folder / "lock", _OPEN, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _set_up(self) -> str:
        """Find what is here, for all processes of the machine; return the folder of what they share.

        It goes with this process or, if that is killed, with whoever comes next. In POSIX shared memory, under names
        that anybody may take, two runs that start together could meet, and a full /dev/shm would be a SIGBUS.
        """
        if self._remote is not None:
            _lock_cache(self.folder)
        states, usage = self._found()
        self.shared_folder = _PROCESS.enter_context(temporary_folder("data"))
        arrays = self._arrays()
        arrays[0][:] = states
        arrays[1][:] = time.time_ns()
        arrays[4][0] = usage
        return str(self.shared_folder)

    def _arrays(self) -> list[NDArray[Any]]:
        """Return the arrays of `_ARRAYS`, one number a shard, and the bytes that the folder takes."""
        sizes = {name: (np.dtype(kind), len(self._table)) for name, kind in _ARRAYS.items()}
        sizes["usage"] = (np.dtype(np.int64), 1)
        return [_shared(self.shared_folder / name, kind, number) for name, (kind, number) in sizes.items()]

    def _found(self) -> tuple[NDArray[np.uint8], int]:
        """Return which shards are here, and the bytes that they take with the index."""
        here = {kind: np.zeros(len(self._table), np.bool_) for kind in ("raw", "zip")}
        for found in filter(None, map(_NAME.fullmatch, os.listdir(self.folder))):
            if (number := int(found[1])) < len(self._table):
                here["zip" if found[2] else "raw"][number] = True
        index = (self.folder / INDEX_FILE).stat().st_size
        if self._remote is None:
            self._check_complete(here)
        else:
            self._check_limit(index)
            # Of an earlier version that was killed while it unpacked.
            for number in np.flatnonzero(here["zip"]).tolist():
                (self.folder / shard_names(number)[1]).unlink()
            here["zip"][:] = False
        size = sum(int(self._table.rows[f"{kind}_bytes"][which].sum(dtype=np.int64)) for kind, which in here.items())
        return np.where(here["raw"] | here["zip"], _HERE, _AWAY).astype(np.uint8), index + size

    def _check_complete(self, here: dict[str, NDArray[np.bool_]]) -> None:
        first = self._table[0]
        for number in np.flatnonzero(~here["zip" if first.zip_data else "raw"])[:1].tolist():
            name = self._table[number].stored.basename
            raise FileNotFoundError(f"{self.folder / name} is missing; copy the data again")

    def _check_limit(self, index: int) -> None:
        least = index + 4 * int(self._most_bytes.max())
        if self._limit < least:
            raise ValueError(
                f"data.cache_limit is {self._limit:,.0f} bytes; it must hold the index of {self.folder} ({index:,} "
                f"bytes) and four shards as packed and unpacked: set it to at least {-(-least // 2**20)}mb"
            )


def _as_indexed(file: Path, indexed: ShardFile) -> bytes:
    content = read_regular(file, indexed.bytes)
    if xxhash.xxh64_hexdigest(content) != indexed.hashes.xxh64:
        raise ValueError(f"it does not match its hash in {INDEX_FILE}")
    return content


def _unpacked(packed: bytes) -> bytes:
    # Else a few kilobytes could fill the memory.
    if not 0 <= (size := zstandard.frame_content_size(packed)) <= SHARD_LIMIT:
        raise ValueError(f"it would unpack to {size / 2**20:g} MiB, which no shard has")
    return zstandard.ZstdDecompressor().decompress(packed)


def _shared(file: Path, kind: np.dtype[Any], number: int) -> NDArray[Any]:
    """Return an array that lies in a file, for all processes that map it; zeros where nobody has written."""
    descriptor = os.open(file, _OPEN, 0o600)
    size = max(1, number * kind.itemsize)
    try:
        # Whoever writes finds room on the disk: without, that would be a SIGBUS.
        if os.fstat(descriptor).st_size < size:
            os.posix_fallocate(descriptor, 0, size)
        return np.frombuffer(mmap.mmap(descriptor, size), kind, number)  # the mapping keeps a copy of the descriptor
    except OSError as error:
        way_out = "make room there, or set TMPDIR to another folder"
        raise OSError(error.errno, f"{error.strerror}; {way_out}", str(file)) from error
    finally:
        os.close(descriptor)


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
