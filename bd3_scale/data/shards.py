"""Reading the samples of one split: download, cache, checks, random access."""

from __future__ import annotations

import functools
import logging
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from bd3_scale.data.cache import ShardSizes
from bd3_scale.data.index import INDEX_FILE, SHARD_LIMIT, read_index
from bd3_scale.data.manifest import Manifest, SplitName
from bd3_scale.data.mosaicml import Lock, SharedArray, Stream, StreamingDataset, get_hash
from bd3_scale.data.remote import DamagedError, check_came, patiently
from bd3_scale.recipe.schema import DATA_RETRY_MINUTES, DataRecipe
from bd3_scale.resilience.leftovers import own_folder
from bd3_scale.resilience.readers import read_regular

HASH = "xxh64"
REMOTE_STATE, LOCAL_STATE = 1, 3  # streaming's _ShardState

_LOG = logging.getLogger(__name__)


def open_shards(data: DataRecipe, manifest: Manifest, split: SplitName) -> Shards:
    """Return the samples of `split`, opened once a process; collective over all ranks when it opens them.

    `load_manifest` has put the index where the shards are, or will be. Raises ValueError if the split is not there, or
    if recipe, manifest and shards contradict each other; FileNotFoundError if a shard is missing.
    """
    counts = manifest.train if split == "train" else manifest.validation
    if counts is None:
        raise ValueError(f"{data.path} has no {split} split (it was prepared with holdout={manifest.holdout})")
    if data.seq_len != manifest.seq_len:
        raise ValueError(
            f"data.seq_len={data.seq_len}, but {data.path} was prepared with seq_len={manifest.seq_len}; "
            f"set data.seq_len={manifest.seq_len} or prepare the text again"
        )
    shards = _open(os.path.abspath(data.path), data.remote, data.cache_limit, split, data.retry_minutes)
    if len(shards) != counts.sequences:
        raise ValueError(
            f"{data.path}/{split} holds {len(shards)} sequences, but the manifest says {counts.sequences}; "
            f"the folder mixes two preparations: copy it again"
        )
    return shards


@functools.cache  # what streaming allocates lives until the process ends
def _open(path: str, remote: str | None, cache_limit: str | None, split: SplitName, retry_minutes: float) -> Shards:
    return Shards(path, remote, cache_limit, split, retry_minutes)


class Shards(StreamingDataset):
    """Random access to samples, dictionaries of numpy arrays. A shard is fetched, unpacked and compared with its hash
    when a process first touches it; one that was damaged since it was unpacked is unpacked anew. ValueError if it is
    not what the index says even then. A remote that is away is asked again for `retry_minutes`, see `patiently`.
    """

    def __init__(
        self,
        path: str,
        remote: str | None,
        cache_limit: str | None,
        split: SplitName,
        retry_minutes: float = DATA_RETRY_MINUTES,
    ) -> None:
        if remote is None:
            _check_folder(Path(path, split))
        stream = _Stream(remote=remote, local=path, split=split, validate_hash=HASH, download_retry=1)
        stream.retry_minutes = retry_minutes
        super().__init__(streams=[stream], cache_limit=cache_limit, batch_size=1)
        self._verified: set[int] = set()
        # Of all processes of the node: how often each shard has come from the remote, and whether one was read.
        self._downloads = SharedArray(self.num_shards, np.uint32, f"{self._shm_prefix_int:06}_downloads")
        self._read = SharedArray(self.num_shards, np.bool_, f"{self._shm_prefix_int:06}_read")
        stream.downloads = self._downloads

    @property
    def has_remote(self) -> bool:
        """Return whether shards are fetched."""
        return self.streams[0].remote is not None

    @property
    def downloads_per_shard(self) -> float | None:
        """Return the downloads so far over the shards that were fetched or read, on this node; None before the first.

        It is 1 where every shard came once; above, the cache is smaller than what is in use at a time.
        """
        downloads = self._downloads.numpy()
        touched = int(((downloads > 0) | self._read.numpy()).sum())
        return int(downloads.sum()) / touched if touched else None

    def of(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the shards that hold samples, each once, in the order of first need."""
        shards = np.searchsorted(self.sample_offset_per_shard, sample_ids, side="right") - 1
        return shards[np.sort(np.unique(shards, return_index=True)[1])]

    def __len__(self) -> int:
        return self.num_samples

    @functools.cached_property
    def sizes(self) -> ShardSizes:
        """Return the bytes that they take."""
        files = [shard.file_pairs[0] for shard in self.shards]
        raw = [unpacked.bytes for unpacked, _ in files]
        packed = max((zipped.bytes for _, zipped in files if zipped is not None), default=0)
        beside = self.streams[0].get_index_size() + packed
        return ShardSizes(sum(raw) / len(self), max(raw), sum(raw), beside)

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, NDArray[Any]]:
        shard_id = int(self.spanner[sample_id][0])
        if shard_id not in self._verified:
            self.prepare_shard(shard_id)
            self._verify(shard_id)
            self._verified.add(shard_id)
            self._read[shard_id] = True
        return super().get_item(sample_id, retry)

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        self.streams[0].preparing.shard_id = shard_id
        try:
            super().prepare_shard(shard_id, blocking)
        except BaseException:
            # Streaming would leave the shard "being prepared", and every other process would wait for it for ever.
            self._shard_states[shard_id] = REMOTE_STATE
            raise

    def is_away(self, shard_id: int) -> bool:
        """Return whether a shard is not here, and nobody on the node is fetching it."""
        return bool(self._shard_states[shard_id] == REMOTE_STATE)

    def make_room(self, unused_since: int) -> bool:
        """Remove shards that nobody on the node has used since then, in `time.time_ns`, until two more fit, so that
        another thread can fetch one, too; return whether they do.
        """
        if not self.cache_limit:
            return True
        most = self.cache_limit - 2 * self.max_shard_size_across_all_streams
        with Lock(self._cache_filelock_path):
            while self.cache_usage > most:
                here = self._shard_states.numpy() == LOCAL_STATE
                if self._shard_access_times.numpy()[here].min(initial=unused_since) >= unused_since:
                    return False
                self._evict_coldest_shard()
        return True

    def _verify(self, shard_id: int) -> None:
        # Streaming checks what it unpacks; a file that a former run unpacked may have been damaged since.
        if self._is_damaged(shard_id):
            file = self._unpacked(shard_id)
            _LOG.warning("%s does not match its hash in %s and is unpacked anew", file, INDEX_FILE)
            with self._cache_filelock:
                # Another process may have been first.
                if self._shard_states[shard_id] == LOCAL_STATE and self._is_damaged(shard_id):
                    file.unlink()
                    self.cache_usage -= self.shards[shard_id].file_pairs[0][0].bytes
            self.prepare_shard(shard_id)
            if self._is_damaged(shard_id):
                raise ValueError(f"{file} is damaged: it does not match its hash in {INDEX_FILE}; copy the data again")

    def _is_damaged(self, shard_id: int) -> bool:
        info = self.shards[shard_id].file_pairs[0][0]
        try:
            content = read_regular(self._unpacked(shard_id), info.bytes)
        except FileNotFoundError:  # evicted in the meantime; get_item fetches it again
            return False
        except ValueError:  # longer than it was
            return True
        return bool(get_hash(HASH, content) != info.hashes[HASH])

    def _unpacked(self, shard_id: int) -> Path:
        stream = self.streams[0]
        return Path(stream.local, stream.split, self.shards[shard_id].file_pairs[0][0].basename)


class _Stream(Stream):
    """Unpacks so that runs which share a folder do not disturb each other, throws damaged downloads away, and is
    patient with its remote.
    """

    retry_minutes: float
    downloads: SharedArray

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # Of this process: not every downloader can be used by two threads.
        self._one_by_one = threading.Lock()
        self.preparing = threading.local()

    def prepare_shard(self, shard: Any) -> int:
        if self.remote is None:
            return super().prepare_shard(shard)
        packed = [info for info in shard.file_pairs[0] if info is not None][-1]
        place = os.path.join(self.remote, self.split, packed.basename)
        with self._one_by_one:
            return patiently(functools.partial(super().prepare_shard, shard), place, self.retry_minutes)

    def _download_file(self, from_basename: str, to_basename: str | None = None) -> str:
        local: str = super()._download_file(from_basename, to_basename)
        check_came(os.path.join(self.remote or "", self.split, from_basename), Path(local))
        # Nobody else counts here: a shard is prepared by one at a time.
        self.downloads[self.preparing.shard_id] += 1
        return local

    def get_shards(self, world: Any, allow_unsafe_types: bool) -> list[Any]:
        folder = Path(self.local, self.split or "")
        read_index(folder / INDEX_FILE)
        found: list[Any] = super().get_shards(world, allow_unsafe_types)
        for shard in found if self.remote is None else ():
            packed = [info for info in shard.file_pairs[0] if info is not None][-1]
            # Before streaming takes an unpacked one without it for a left-over, and removes it.
            if not (folder / packed.basename).is_file():
                raise FileNotFoundError(f"{folder / packed.basename} is missing; copy the data again")
        return found

    def _decompress_shard_part(
        self, zip_info: Any, zip_filename: str, raw_filename: str, compression: str | None
    ) -> None:
        try:
            packed = read_regular(Path(zip_filename), zip_info.bytes)
            if get_hash(HASH, packed) != zip_info.hashes[HASH]:
                raise ValueError(f"it does not match its hash in {INDEX_FILE}")
            # Else a few kilobytes could fill the memory.
            if not 0 <= (size := zstandard.frame_content_size(packed)) <= SHARD_LIMIT:
                raise ValueError(f"it would unpack to {size / 2**20:g} MiB, which no shard has")
            unpacked = zstandard.ZstdDecompressor().decompress(packed)
        except (ValueError, zstandard.ZstdError) as error:
            if self.remote is not None:
                os.remove(zip_filename)
            origin = self.remote or self.local
            raise DamagedError(
                f"{zip_filename} is damaged: {error}; copy {Path(origin, self.split, zip_info.basename)} again or "
                f"prepare the data anew"
            ) from error
        with own_folder(Path(raw_filename).parent, ".unpacking.") as aside:
            (aside / "shard").write_bytes(unpacked)
            os.replace(aside / "shard", raw_filename)
        if not self.safe_keep_zip:
            os.remove(zip_filename)


def _check_folder(folder: Path) -> None:
    if not (folder / INDEX_FILE).is_file():
        raise FileNotFoundError(f"{folder / INDEX_FILE} is missing; copy the data again")
    if not os.access(folder, os.W_OK):
        raise PermissionError(
            f"{folder} is not writable, and shards are unpacked beside themselves; name it as data.remote and a "
            f"folder for the cache as data.path"
        )
