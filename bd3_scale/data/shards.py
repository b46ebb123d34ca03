"""Reading the samples of one split: download, cache, checks, random access."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from bd3_scale.data.index import check_index
from bd3_scale.data.manifest import Manifest, SplitName
from bd3_scale.data.mosaicml import Stream, StreamingDataset, get_hash
from bd3_scale.recipe.schema import DataRecipe
from bd3_scale.resilience.leftovers import own_folder

HASH = "xxh64"
REMOTE_STATE = 1  # streaming's _ShardState.REMOTE


def open_shards(data: DataRecipe, manifest: Manifest, split: SplitName) -> Shards:
    """The samples of `split`, opened once a process; collective over all ranks when it opens them.

    Raises ValueError if the split is not there, or if recipe, manifest and shards contradict each other;
    FileNotFoundError if a shard is missing.
    """
    counts = manifest.train if split == "train" else manifest.validation
    if counts is None:
        raise ValueError(f"{data.path} has no {split} split (it was prepared with holdout={manifest.holdout})")
    if data.seq_len != manifest.seq_len:
        raise ValueError(
            f"data.seq_len={data.seq_len}, but {data.path} was prepared with seq_len={manifest.seq_len}; "
            f"set data.seq_len={manifest.seq_len} or prepare the text again"
        )
    shards = _open(os.path.abspath(data.path), data.remote, data.cache_limit, split)
    if len(shards) != counts.sequences:
        raise ValueError(
            f"{data.path}/{split} holds {len(shards)} sequences, but the manifest says {counts.sequences}; "
            f"the folder mixes two preparations: copy it again"
        )
    return shards


@functools.cache  # what streaming allocates lives until the process ends
def _open(path: str, remote: str | None, cache_limit: str | None, split: SplitName) -> Shards:
    return Shards(path, remote, cache_limit, split)


class Shards(StreamingDataset):
    """Random access to samples, dictionaries of numpy arrays. A shard is fetched, unpacked and compared with its hash
    when it is first touched; ValueError if they differ.
    """

    def __init__(self, path: str, remote: str | None, cache_limit: str | None, split: SplitName) -> None:
        if remote is None:
            _check_folder(Path(path, split))
        stream = _Stream(remote=remote, local=path, split=split, validate_hash=HASH)
        super().__init__(streams=[stream], cache_limit=cache_limit, batch_size=1)
        self._verified: set[int] = set()
        if remote is None:
            for shard in self.shards:
                names = [info.basename for info in shard.file_pairs[0]]
                if not any(Path(path, split, name).is_file() for name in names):
                    raise FileNotFoundError(f"{Path(path, split, names[-1])} is missing; copy the data again")

    def __len__(self) -> int:
        return self.num_samples

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, NDArray[Any]]:
        shard_id = int(self.spanner[sample_id][0])
        if shard_id not in self._verified:
            self.prepare_shard(shard_id)
            self._verify(shard_id)
            self._verified.add(shard_id)
        return super().get_item(sample_id, retry)

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        try:
            super().prepare_shard(shard_id, blocking)
        except BaseException:
            # Streaming would leave the shard "being prepared", and every other process would wait for it for ever.
            self._shard_states[shard_id] = REMOTE_STATE
            raise

    def _verify(self, shard_id: int) -> None:
        # Streaming checks what it unpacks; a file that a former run unpacked may have been damaged since.
        stream, unpacked = self.streams[0], self.shards[shard_id].file_pairs[0][0]
        file = Path(stream.local, stream.split, unpacked.basename)
        try:
            data = file.read_bytes()
        except FileNotFoundError:  # evicted in the meantime; get_item fetches it again
            return
        if get_hash(HASH, data) != unpacked.hashes[HASH]:
            raise ValueError(
                f"{file} is damaged: it does not match its hash in index.json; delete it, it is unpacked anew"
            )


class _Stream(Stream):
    """Unpacks so that runs which share a folder do not disturb each other, and throws damaged downloads away."""

    def get_shards(self, world: Any, allow_unsafe_types: bool) -> list[Any]:
        index = Path(self.local, self.split or "", "index.json")
        try:
            found: list[Any] = super().get_shards(world, allow_unsafe_types)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, AssertionError) as error:
            if index.exists():
                check_index(index)
            raise ValueError(f"{index} cannot be read ({error!r}); copy the data again") from error
        check_index(index)
        return found

    def _decompress_shard_part(
        self, zip_info: Any, zip_filename: str, raw_filename: str, compression: str | None
    ) -> None:
        with own_folder(Path(raw_filename).parent, ".unpacking.") as folder:
            aside = str(folder / "shard")
            try:
                super()._decompress_shard_part(zip_info, zip_filename, aside, compression)
            except ValueError as error:
                if self.remote is not None:
                    os.remove(zip_filename)
                origin = self.remote or self.local
                raise ValueError(
                    f"{zip_filename} is damaged: it does not match its hash in index.json ({error}); "
                    f"copy {Path(origin, self.split, zip_info.basename)} again or prepare the data anew"
                ) from error
            os.replace(aside, raw_filename)


def _check_folder(folder: Path) -> None:
    if not (folder / "index.json").is_file():
        raise FileNotFoundError(f"{folder / 'index.json'} is missing; copy the data again")
    if not os.access(folder, os.W_OK):
        raise PermissionError(
            f"{folder} is not writable, and shards are unpacked beside themselves; name it as data.remote and a "
            f"folder for the cache as data.path"
        )
