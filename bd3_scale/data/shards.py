"""Give random access to the samples of one split; each shard is verified when it is first read."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from bd3_scale.data.cache import ShardSizes, bytes_of
from bd3_scale.data.index import INDEX_FILE, ShardTable
from bd3_scale.data.manifest import Manifest, SplitName, check_seq_len
from bd3_scale.data.shard_files import ShardFiles
from bd3_scale.recipe.schema import DATA_RETRY_MINUTES, DataRecipe
from bd3_scale.resilience.readers import read_regular

# Tries to read a sample whose shard is evicted meanwhile. A cache so small that this happens is refused at the start.
_TRIES = 8

_LOG = logging.getLogger(__name__)
_OPEN: dict[tuple[object, ...], Shards] = {}


def open_shards(data: DataRecipe, manifest: Manifest, split: SplitName) -> Shards:
    """Return the samples of `split`, opened once in a process; the first call is collective over all ranks.

    manifest: from `load_manifest`, which has put the index into the folder of the shards. Raises ValueError if there is
    no such split, or if recipe, manifest and shards contradict each other; FileNotFoundError if a shard is missing.
    """
    counts = manifest.train if split == "train" else manifest.validation
    if counts is None:
        raise ValueError(f"{data.path} has no {split} split (it was prepared with holdout={manifest.holdout})")
    check_seq_len(data, manifest)
    opened = (os.path.abspath(data.path), data.remote, data.cache_limit, split, data.retry_minutes)
    # Kept for the process: the shared memory of `ShardFiles` lives until then.
    if opened not in _OPEN:
        path, remote, cache_limit, _, retry_minutes = opened
        _OPEN[opened] = Shards(path, remote, cache_limit, split, counts.shards, retry_minutes)
    shards = _OPEN[opened]
    if len(shards) != counts.sequences:
        raise ValueError(
            f"{data.path}/{split} holds {len(shards)} sequences, but the manifest says {counts.sequences}; "
            f"the folder mixes two preparations: copy it again"
        )
    return shards


class Shards:
    """Random access to the N samples in `table`, as dictionaries of numpy arrays.

    A shard is fetched, unpacked and compared with its hash when a process first needs it. An unpacked file that was
    damaged later is unpacked again; ValueError if it still differs from its index. A remote that does not answer is
    retried for `retry_minutes`, see `with_retries`. Collective over all ranks at construction, see `ShardFiles`.

    samples_per_shard: int64 [number of shards].
    """

    def __init__(
        self,
        path: str,
        remote: str | None,
        cache_limit: str | None,
        split: SplitName,
        table: ShardTable,
        retry_minutes: float = DATA_RETRY_MINUTES,
    ) -> None:
        folder = Path(path, split)
        if remote is None:
            _check_folder(folder)
        self.has_remote = remote is not None
        self._table = table
        self.samples_per_shard = table.rows["samples"].astype(np.int64)
        self._ends = np.cumsum(self.samples_per_shard)
        self._verified = np.zeros(len(table), np.bool_)
        self.files = ShardFiles(
            folder,
            table,
            remote=remote and os.path.join(remote, split),
            limit=bytes_of(cache_limit) if cache_limit else None,
            retry_minutes=retry_minutes,
        )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> dict[str, NDArray[Any]]:
        if not 0 <= number < len(self):
            raise IndexError(f"there is no sample {number} of {len(self)}")
        shard = int(np.searchsorted(self._ends, number, side="right"))
        place = number - int(self._ends[shard]) + int(self.samples_per_shard[shard])
        if not self._verified[shard]:
            self.files.prepare(shard)
            self._verify(shard)
            self._verified[shard] = True
        for _ in range(_TRIES):
            try:
                content = _sample_bytes(self.files.unpacked(shard), place)
            except FileNotFoundError:  # another process has evicted it
                self.files.prepare(shard)
            else:
                self.files.note_use(shard)
                return self._decode(content)
        raise ValueError(
            f"{self.files.unpacked(shard)} was removed for other shards {_TRIES} times before it could be read; raise "
            f"data.cache_limit"
        )

    @functools.cached_property
    def sizes(self) -> ShardSizes:
        """Return the sizes of the shards, in bytes."""
        raw, packed = self._table.rows["raw_bytes"].astype(np.int64), self._table.rows["zip_bytes"]
        overhead = (self.files.folder / INDEX_FILE).stat().st_size + int(packed.max())
        return ShardSizes(int(raw.sum()) / len(self), int(raw.max()), int(raw.sum()), overhead)

    def of(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the shards that hold some samples, each once, in the order in which they are first needed."""
        shards = np.searchsorted(self._ends, sample_ids, side="right")
        return shards[np.sort(np.unique(shards, return_index=True)[1])]

    @functools.cached_property
    def _decode(self) -> Any:
        """Return the function that decodes a sample; it is the same for all shards."""
        from bd3_scale.data.mosaicml import reader_from_json

        return reader_from_json("", "", self._table[0].model_dump()).decode_sample

    def _verify(self, shard: int) -> None:
        # `prepare` has verified a shard that it unpacked, but not one that an earlier run unpacked.
        damaged = functools.partial(self._is_damaged, shard)
        if damaged():
            file = self.files.unpacked(shard)
            _LOG.warning("%s does not match its hash in %s and is unpacked again", file, INDEX_FILE)
            self.files.repair(shard, damaged)
            if damaged():
                raise ValueError(f"{file} is damaged: it does not match its hash in {INDEX_FILE}; copy the data again")

    def _is_damaged(self, shard: int) -> bool:
        row = self._table.rows[shard]
        try:
            content = read_regular(self.files.unpacked(shard), int(row["raw_bytes"]))
        except FileNotFoundError:  # evicted meanwhile; `__getitem__` fetches it again
            return False
        except ValueError:  # longer than it was
            return True
        return xxhash.xxh64_intdigest(content) != row["raw_hash"]


def _sample_bytes(file: Path, place: int) -> bytes:
    """Return a sample's bytes. In MDS, word 1 + i of a shard is the offset of sample i, and the last word its end."""
    with open(file, "rb", buffering=0) as shard:
        shard.seek(4 + 4 * place)
        begin, end = np.frombuffer(shard.read(8), "<u4").tolist()
        shard.seek(begin)
        return shard.read(end - begin)


def _check_folder(folder: Path) -> None:
    if not (folder / INDEX_FILE).is_file():
        raise FileNotFoundError(f"{folder / INDEX_FILE} is missing; copy the data again")
    if not os.access(folder, os.W_OK):
        raise PermissionError(
            f"{folder} is not writable, and shards are unpacked into it; name it as data.remote and a "
            f"folder for the cache as data.path"
        )
