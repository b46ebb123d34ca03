"""The index of a split's shards, as `prepare` has streaming write it, checked before what it names is opened."""

from __future__ import annotations

import re
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


class _File(_Strict):
    basename: Name
    bytes: Annotated[int, Field(ge=0, le=SHARD_LIMIT)]
    hashes: _Hashes


class _Shard(_Strict):
    column_encodings: list[str]
    column_names: list[str]
    column_sizes: list[Count | None]
    compression: Literal["zstd"] | None
    format: Literal["mds"]
    hashes: list[Literal["xxh64"]]
    raw_data: _File
    samples: Count
    size_limit: Count
    version: Literal[2]
    zip_data: _File | None


class _Index(_Strict):
    shards: list[_Shard]
    version: Literal[2]


_ADAPTER = TypeAdapter(_Index)


@reader("an index of shards")
def read_index(path: Path) -> tuple[str, ...]:
    """Return what an index says of each shard's contents, see `parse_index`."""
    return parse_index(path, read_regular(path, INDEX_LIMIT))


def parse_index(place: Path | str, content: bytes) -> tuple[str, ...]:
    """Return the XXH64 of each shard's unpacked bytes and its number of samples, as `<hash>/<samples>`.

    Raises:
        ValueError: `content` is not an index that `prepare` made; `place` and what is wrong are named.
    """
    try:
        index = _ADAPTER.validate_json(content)
    except ValidationError as error:
        raise ValueError(f"{place} is damaged ({in_one_line(error)}); copy the data again") from error
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
    return tuple(f"{shard.raw_data.hashes.xxh64}/{shard.samples}" for shard in index.shards)
