"""Read and merge the indices of shards, which MosaicML streaming writes; check them before the files they name."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, TypeAdapter, ValidationError

from bd3_scale.resilience.readers import in_one_line, read_regular, reader

INDEX_FILE = "index.json"
# The limit of an unpacked shard, in bytes; `prepare` ends a shard before a quarter of it.
SHARD_LIMIT = 1 << 28
# The limit of an index: some hundred bytes a shard; 100 TB of text have more than a million shards.
INDEX_LIMIT = 1 << 30
Count = Annotated[int, Field(ge=0, le=SHARD_LIMIT)]
# A file name without a folder: an index must not name files elsewhere.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
_TOKENS = re.compile(r"ndarray:uint(16|32):(\d{1,9})")
# The boundary between the entries of two shards: within an entry no object follows another one.
_BETWEEN_SHARDS = re.compile(rb"\}\s*,\s*\{")
# The parts in which entries differ: the number in file names, hashes, sizes and counts.
_NUMBERS = re.compile(
    rb'"shard\.(?P<name>\d+)|"xxh64"\s*:\s*"(?P<hash>[0-9a-f]{16})"|"(?:bytes|samples)"\s*:\s*(?P<count>\d+)'
)
_BLANK, _NOTHING = re.compile(rb"\s*\Z"), re.compile(rb"(?!)")

# One shard: its sequences, and the size and XXH64 of its file, unpacked and packed.
_ROW = np.dtype(
    [("samples", "<u4"), ("raw_bytes", "<u4"), ("raw_hash", "<u8"), ("zip_bytes", "<u4"), ("zip_hash", "<u8")]
)
_Row = tuple[int, int, int, int, int]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Hashes(_Strict):
    xxh64: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]


class ShardFile(_Strict):
    """A file in the split's folder."""

    basename: Name
    bytes: Count
    hashes: _Hashes


class ShardFormat(_Strict):
    """The storage format of a shard's samples, the same for all shards of an index."""

    column_encodings: list[str]
    column_names: list[str]
    column_sizes: list[Annotated[int, Field(ge=0)] | None]
    compression: Literal["zstd"] | None
    format: Literal["mds"]
    hashes: list[Literal["xxh64"]]
    size_limit: Annotated[int, Field(ge=0)]
    version: Literal[2]


class Shard(ShardFormat):
    """The entry of a shard in an index; zip_data: the packed file, which is then the one that exists."""

    raw_data: ShardFile
    samples: Count
    zip_data: ShardFile | None

    @property
    def stored(self) -> ShardFile:
        """Return the file that exists in the folder."""
        return self.zip_data or self.raw_data


class _Index(_Strict):
    shards: list[Shard]
    version: Literal[2]


_ADAPTER = TypeAdapter(_Index)


@dataclass(frozen=True, eq=False)
class ShardTable:
    """The entries of an index of N shards, in 28 bytes each; the JSON of 600,000 shards has 350 MB.

    rows [N]: see `_ROW`. format: None if only the `identities` are known, which is what a run keeps of its data.
    """

    rows: NDArray[np.void]
    format: ShardFormat | None

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Shard]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, number: int) -> Shard:
        """Return the entry of one shard; its file names follow from its number, as streaming gives them."""
        row = self.rows[number]

        def file(kind: str, name: str) -> ShardFile:
            digits = f"{int(row[f'{kind}_hash']):016x}"
            return ShardFile(basename=name, bytes=int(row[f"{kind}_bytes"]), hashes=_Hashes(xxh64=digits))

        assert self.format is not None
        raw_name, zip_name = shard_names(number)
        packed = file("zip", zip_name) if self.format.compression else None
        shared = {name: getattr(self.format, name) for name in ShardFormat.model_fields}
        return Shard(**shared, raw_data=file("raw", raw_name), samples=int(row["samples"]), zip_data=packed)

    def __eq__(self, other: object) -> bool:
        """Return whether the shards hold the same samples, packed or not."""
        if not isinstance(other, ShardTable):
            return NotImplemented
        return len(self) == len(other) and not self.differing(other)

    __hash__ = None  # type: ignore[assignment]

    def differing(self, other: ShardTable) -> int:
        """Return how many shards hold samples different from those of the same number in `other`."""
        both = min(len(self), len(other))
        ours, theirs = self.rows[:both], other.rows[:both]
        different = (ours["raw_hash"] != theirs["raw_hash"]) | (ours["samples"] != theirs["samples"])
        return int(different.sum()) + max(len(self), len(other)) - both

    def identities(self) -> Iterator[str]:
        """Yield the XXH64 of each shard's unpacked bytes and its number of samples, as `<hash>/<samples>`."""
        for start in range(0, len(self), 1024):
            part = self.rows[start : start + 1024]
            for digits, samples in zip(part["raw_hash"].tolist(), part["samples"].tolist(), strict=True):
                yield f"{digits:016x}/{samples}"

    @property
    def stored_bytes(self) -> int:
        """Return the size of all shard files as stored."""
        kind = "zip_bytes" if self.format and self.format.compression else "raw_bytes"
        return int(self.rows[kind].sum(dtype=np.int64))

    def save(self, name: Path) -> None:
        """Write the table as files with the path `name` and two suffixes, for `load`."""
        assert self.format is not None
        name.with_suffix(".json").write_text(self.format.model_dump_json(), encoding="utf-8")
        np.save(name.with_suffix(".npy"), self.rows)

    @classmethod
    def load(cls, name: Path) -> ShardTable:
        """Return the table that `save` wrote, memory-mapped and so shared between processes.

        The files may be removed afterwards.
        """
        format = ShardFormat.model_validate_json(read_regular(name.with_suffix(".json")))
        return cls(np.load(name.with_suffix(".npy"), mmap_mode="r"), format)


def _known(value: Any) -> ShardTable:
    """Return the table of a list of `identities`, as a run keeps it."""
    if isinstance(value, ShardTable):
        return value
    if not isinstance(value, Sequence) or not all(isinstance(one, str) for one in value):
        raise ValueError("it is not a list of shards")
    matches = [re.fullmatch(r"([0-9a-f]{16})/(\d{1,9})", one) for one in value]
    if None in matches:
        raise ValueError(f"{value[matches.index(None)]!r} is not HASH/SAMPLES")
    return ShardTable(np.array([(int(one[2]), 0, int(one[1], 16), 0, 0) for one in matches if one], _ROW), None)


def _written(table: ShardTable) -> list[str]:
    return list(table.identities())


# In JSON files it is the list of its `identities`.
ShardField = Annotated[ShardTable, PlainValidator(_known), PlainSerializer(_written)]
NO_SHARDS = ShardTable(np.empty(0, _ROW), None)


def shard_names(number: int) -> tuple[str, str]:
    """Return the file names of a shard, unpacked and packed, as streaming gives them."""
    return f"shard.{number:05}.mds", f"shard.{number:05}.mds.zstd"


def merge_indices(path: Path, paths: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """Write the index `path` of the shards in the indices `paths`, renumbered in this order.

    Yields each shard's file and its new name; the caller puts the file there. Only one index is in memory at a time.
    """
    number = 0
    with path.open("w", encoding="utf-8") as file:
        file.write('{"shards": [')
        for one in paths:
            for shard in read_shards(one):
                numbered = _numbered(shard, number)
                file.write(", " * (number > 0) + json.dumps(numbered.model_dump(), sort_keys=True))
                yield one.with_name(shard.stored.basename), numbered.stored.basename
                number += 1
        file.write('], "version": 2}')


def _numbered(shard: Shard, number: int) -> Shard:
    """Return a shard's entry with the file names of that number."""
    named = [
        file and file.model_copy(update={"basename": name})
        for file, name in zip((shard.raw_data, shard.zip_data), shard_names(number), strict=True)
    ]
    return shard.model_copy(update={"raw_data": named[0], "zip_data": named[1]})


@reader("an index of shards")
def read_shards(path: Path) -> ShardTable:
    """Return the table of a task's index, which may be empty."""
    return _parse(path, read_regular(path, INDEX_LIMIT))


@reader("an index of shards")
def read_index(path: Path) -> ShardTable:
    """Return the table of an index; see `parse_index`."""
    return parse_index(path, read_regular(path, INDEX_LIMIT))


def parse_index(place: Path | str, content: bytes) -> ShardTable:
    """Return the table of an index.

    Raises:
        ValueError: `content` is not an index that `prepare` made; the message names `place` and what is wrong.
    """
    table = _parse(place, content)
    if not table.rows["samples"].any():
        raise ValueError(f"{place} is damaged: it has no samples; copy the data again")
    return table


def _parse(place: Path | str, content: bytes) -> ShardTable:
    try:
        first, last = content.find(b"["), content.rfind(b"]")
        _ADAPTER.validate_json(content[: first + 1] + content[last:] if 0 <= first < last else content)
        if _BLANK.match(content, first + 1, last):
            return NO_SHARDS
        shard, end = _entry(content, first + 1, last, 0)
        _check(shard, shard, 0)
        rows = itertools.chain([_row(shard)], _rows(content, first + 1, end, last, shard))
        return ShardTable(np.fromiter(rows, _ROW), _format(shard))
    except ValueError as error:
        raise ValueError(f"{place} is damaged ({in_one_line(error)}); copy the data again") from error


def _entry(content: bytes, start: int, last: int, number: int) -> tuple[Shard, int]:
    """Return one entry of the list that ends at `last`, and the beginning of the next entry, or `last`."""
    between = _BETWEEN_SHARDS.search(content, start, last)
    end, following = (between.start() + 1, between.end() - 1) if between else (last, last)
    try:
        return Shard.model_validate_json(content[start:end]), following
    except ValidationError as error:
        raise ValueError(f"shards.{number}.{in_one_line(error)}") from error


def _rows(content: bytes, first: int, start: int, last: int, model: Shard) -> Iterator[_Row]:
    """Yield the rows of the entries from `start` on; the entry at `first` is `model`.

    An entry whose text equals the first one's except for the numbers is as valid as that. Any other entry is parsed,
    which takes ten times as long.
    """
    same_form = _pattern(content[first:start], last == start)
    match = same_form.match(content, first, last)
    if not match or _row_of(match, 0) != _row(model):  # the keys stand in an order that the pattern does not expect
        same_form = _NOTHING
    number = 1
    while start < last:
        match = same_form.match(content, start, last)
        row = match and _row_of(match, number)
        if match and row:
            yield row
            start = match.end()
        else:
            shard, start = _entry(content, start, last, number)
            _check(shard, model, number)
            yield _row(shard)
        number += 1


def _pattern(entry: bytes, is_last: bool) -> re.Pattern[bytes]:
    """Return a pattern for entries that differ from this one in numbers only, with the separator after them."""
    text = entry if is_last else entry[: entry.rindex(b"}") + 1]
    parts, end = [], 0
    for number in _NUMBERS.finditer(text):
        name, hexadecimal, decimal = (number[group] is not None for group in ("name", "hash", "count"))
        place = number.span("name" if name else "hash" if hexadecimal else "count")
        what = rb"(\d+)" if name else rb"([0-9a-f]{16})" if hexadecimal else rb"(0|[1-9]\d{0,8})"
        assert decimal or name or hexadecimal
        parts += [re.escape(text[end : place[0]]), what]
        end = place[1]
    return re.compile(b"".join([*parts, re.escape(text[end:].rstrip()), rb"(?:\s*,\s*(?=\{)|\s*\Z)"]))


def _row_of(match: re.Match[bytes], number: int) -> _Row | None:
    """Return the row of a matched entry, or None if its names or sizes are not allowed."""
    groups = match.groups()
    names = groups[::4]
    if len(groups) not in (4, 7) or any(name != b"%05d" % number for name in names):
        return None
    raw_bytes, samples = int(groups[1]), int(groups[3])
    zip_bytes, zip_hash = (int(groups[5]), int(groups[6], 16)) if len(groups) == 7 else (0, 0)
    if max(raw_bytes, samples, zip_bytes) > SHARD_LIMIT:
        return None
    return samples, raw_bytes, int(groups[2], 16), zip_bytes, zip_hash


def _format(shard: Shard) -> ShardFormat:
    return ShardFormat(**{name: getattr(shard, name) for name in ShardFormat.model_fields})


def _check(shard: Shard, model: Shard, number: int) -> None:
    """Raise ValueError unless a shard is named by its number, is stored like `model` and holds sequences."""
    if number == 0:
        _check_columns(shard)
    limit = {"size_limit": model.size_limit}
    if _format(shard).model_copy(update=limit) != _format(model):
        raise ValueError(f"shard {number} has columns {_columns(shard)}, unlike shard 0, or other compression")
    names = [file.basename for file in (shard.raw_data, shard.zip_data) if file]
    expected = list(shard_names(number)[: 2 if shard.compression else 1])
    if names != expected:
        raise ValueError(f"shard {number} has the files {names}, not {expected}")


def _columns(shard: Shard) -> dict[str, tuple[str, int | None]]:
    return dict(zip(shard.column_names, zip(shard.column_encodings, shard.column_sizes, strict=False), strict=False))


def _check_columns(shard: Shard) -> None:
    columns = _columns(shard)
    tokens, size = columns.get("tokens", ("", None))
    match = _TOKENS.fullmatch(tokens)
    others = {columns.get(name) for name in ("counted_lengths", "document_lengths", *columns.keys() & {"shown"})}
    if not match or size != int(match[1]) // 8 * int(match[2]) or others != {("ndarray:int32", None)}:
        raise ValueError(f"shard 0 has columns {columns}")


def _row(shard: Shard) -> _Row:
    packed = shard.zip_data
    zip_bytes, zip_hash = (packed.bytes, int(packed.hashes.xxh64, 16)) if packed else (0, 0)
    return shard.samples, shard.raw_data.bytes, int(shard.raw_data.hashes.xxh64, 16), zip_bytes, zip_hash
