"""The index of a split's shards, as `prepare` has streaming write it, checked before what it names is opened."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from bd3_scale.resilience.readers import in_one_line, read_regular, reader

INDEX_FILE = "index.json"
# Of a shard, in bytes as unpacked; `prepare` ends one before it has a quarter of that.
SHARD_LIMIT = 1 << 28
# Of an index: some hundred bytes a shard, of which 100 TB of text have more than a million.
INDEX_LIMIT = 1 << 30
Count = Annotated[int, Field(ge=0)]
# A file of the split's own folder.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
_TOKENS = re.compile(r"ndarray:uint(16|32):(\d{1,9})")


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Hashes(_Strict):
    xxh64: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]


class ShardFile(_Strict):
    """A file of the split's folder."""

    basename: Name
    bytes: Annotated[int, Field(ge=0, le=SHARD_LIMIT)]
    hashes: _Hashes


class Shard(_Strict):
    """What an index says of one shard; zip_data: of its packed file, which is the one that is there."""

    column_encodings: list[str]
    column_names: list[str]
    column_sizes: list[Count | None]
    compression: Literal["zstd"] | None
    format: Literal["mds"]
    hashes: list[Literal["xxh64"]]
    raw_data: ShardFile
    samples: Count
    size_limit: Count
    version: Literal[2]
    zip_data: ShardFile | None

    @property
    def stored(self) -> ShardFile:
        """Return the file that lies in the folder."""
        return self.zip_data or self.raw_data

    def numbered(self, number: int) -> Shard:
        """Return it with the names that streaming gives the shard of this number."""

        def named(file: ShardFile) -> ShardFile:
            return file.model_copy(update={"basename": f"shard.{number:05}.{file.basename.split('.', 2)[2]}"})

        return self.model_copy(
            update={"raw_data": named(self.raw_data), "zip_data": self.zip_data and named(self.zip_data)}
        )


class _Index(_Strict):
    shards: list[Shard]
    version: Literal[2]


_ADAPTER = TypeAdapter(_Index)


def merge_indices(path: Path, paths: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """Write the index `path` of the shards that the indices `paths` list, numbered anew in this order.

    Yields each shard's file and its new name, for the caller to put it there. Holds one index in memory at a time.
    """
    number = 0
    with path.open("w", encoding="utf-8") as file:
        file.write('{"shards": [')
        for one in paths:
            for shard in read_shards(one):
                numbered = shard.numbered(number)
                file.write(", " * (number > 0) + json.dumps(numbered.model_dump(), sort_keys=True))
                yield one.with_name(shard.stored.basename), numbered.stored.basename
                number += 1
        file.write('], "version": 2}')


@reader("an index of shards")
def read_shards(path: Path) -> list[Shard]:
    """Return what the index of a task says, which may have no shard."""
    return _read(path, read_regular(path, INDEX_LIMIT)).shards


@reader("an index of shards")
def read_index(path: Path) -> tuple[str, ...]:
    """Return what an index says of each shard's contents, see `parse_index`."""
    return parse_index(path, read_regular(path, INDEX_LIMIT))


def parse_index(place: Path | str, content: bytes) -> tuple[str, ...]:
    """Return the XXH64 of each shard's unpacked bytes and its number of samples, as `<hash>/<samples>`.

    Raises as `parse_shards`.
    """
    return tuple(f"{shard.raw_data.hashes.xxh64}/{shard.samples}" for shard in parse_shards(place, content))


def parse_shards(place: Path | str, content: bytes) -> list[Shard]:
    """Return what an index says of each shard.

    Raises:
        ValueError: `content` is not an index that `prepare` made; `place` and what is wrong are named.
    """
    index = _read(place, content)
    if not any(shard.samples for shard in index.shards):
        raise ValueError(f"{place} is damaged: it has no samples; copy the data again")
    for number, shard in enumerate(index.shards):
        columns = dict(
            zip(shard.column_names, zip(shard.column_encodings, shard.column_sizes, strict=False), strict=False)
        )
        tokens, size = columns.get("tokens", ("", None))
        found = _TOKENS.fullmatch(tokens)
        others = {columns.get(name) for name in ("counted_lengths", "document_lengths", *columns.keys() & {"shown"})}
        if not found or size != int(found[1]) // 8 * int(found[2]) or others != {("ndarray:int32", None)}:
            raise ValueError(f"{place} is damaged: shard {number} has columns {columns}; copy the data again")
    return index.shards


def _read(place: Path | str, content: bytes) -> _Index:
    try:
        return _ADAPTER.validate_json(content)
    except ValidationError as error:
        raise ValueError(f"{place} is damaged ({in_one_line(error)}); copy the data again") from error
