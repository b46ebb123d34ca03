"""Read token samples from MosaicML's MDS as Foundry writes it: the column `tokens`, as `bytes` or `ndarray`."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, cast

import numpy as np
import zstandard
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from bd3_scale.data.index import INDEX_FILE, INDEX_LIMIT
from bd3_scale.data.zstd import ZstdFile
from bd3_scale.resilience.readers import in_one_line, read_regular, reader

# MDS stores offsets as uint32.
SHARD_BYTES = 1 << 32
# Limit of a sample.
MAX_SAMPLE_BYTES = 1 << 30
_TOKENS = re.compile(r"bytes|ndarray(:u?int\d+(:\d+)?)?")
# The dtypes that `bytes` may hold, widest first: two narrow ids read as one wide id exceed the vocabulary.
_DTYPES = ("<i8", "<i4", "<u2")
# A path below the index's folder: merged indices name files in subfolders.
_Name = Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*/)*[A-Za-z0-9][A-Za-z0-9._-]*$")]
_Count = Annotated[int, Field(ge=0, lt=SHARD_BYTES)]


class _File(BaseModel):
    basename: _Name
    bytes: _Count


class Shard(BaseModel):
    """The entry of a shard in an index."""

    column_encodings: list[str]
    column_names: list[str]
    column_sizes: list[_Count | None]
    compression: str | None
    format: Literal["mds"]
    raw_data: _File
    samples: _Count
    version: Literal[2]
    zip_data: _File | None


class _Index(BaseModel):
    shards: list[Shard]


def shards(folders: Iterable[Path]) -> dict[Path, Shard]:
    """Return the shards of MDS folders by their existing files, in order.

    Raises FileNotFoundError and ValueError: a folder, index or file is missing, or it holds no tokens.
    """
    files: dict[Path, Shard] = {}
    for folder in folders:
        if not (folder / INDEX_FILE).is_file():
            inner = sorted(path.parent.name for path in folder.glob(f"*/{INDEX_FILE}"))
            hint = f", but {', '.join(inner)} in it: name one of these" if inner else ": name a folder of MDS"
            raise FileNotFoundError(f"{folder} has no {INDEX_FILE}{hint}")
        for shard in _read_index(folder / INDEX_FILE).shards:
            names = [info.basename for info in (shard.raw_data, shard.zip_data) if info is not None]
            file = next((folder / name for name in names if (folder / name).is_file()), None)
            if file is None:
                raise FileNotFoundError(f"{folder / names[-1]} is missing; copy the data again")
            files[file] = shard
    return files


@reader("an index of MDS")
def _read_index(path: Path) -> _Index:
    index = _Index.model_validate_json(read_regular(path, INDEX_LIMIT))
    for shard in index.shards:
        columns = dict(zip(shard.column_names, shard.column_encodings, strict=True))
        if not _TOKENS.fullmatch(columns.get("tokens", "")):
            there = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
            raise ValueError(
                f"{path}: no column `tokens` of bytes or ndarray, but {there}: text belongs to `data prepare`"
            )
        if len(shard.column_sizes) != len(columns):
            raise ValueError(f"{path} is damaged: {len(columns)} columns with {len(shard.column_sizes)} sizes")
        if shard.compression and shard.compression.partition(":")[0] != "zstd":
            raise ValueError(f"{path}: packed with {shard.compression}; only zstd can be read: unpack the shards first")
    return index


def samples(
    file: Path, raw: BinaryIO, shard: Shard, is_token: NDArray[np.bool_]
) -> Iterator[tuple[str, NDArray[np.integer]]]:
    """Yield each sample of a shard, whose `file` is opened as `raw`: where it stands, and its ids.

    is_token: bool by id, whether a token has it. Raises ValueError for a damaged shard.
    """
    try:
        stream = raw if file.name == Path(shard.raw_data.basename).name else _unpacked(raw, shard.raw_data.bytes)
        (count,) = np.frombuffer(stream.read(4), "<u4")
        if count != shard.samples:
            raise ValueError(f"{count} samples, where the index has {shard.samples}")
        places = np.frombuffer(stream.read(4 * (int(count) + 1)), "<u4").astype(np.int64)
        sizes = np.diff(places)
        if len(places) != count + 1 or np.any(sizes < 0) or np.any(sizes > MAX_SAMPLE_BYTES):
            raise ValueError("its samples do not follow each other")
        dtype = ""
        for number, (begin, end) in enumerate(itertools.pairwise(places.tolist())):
            stream.seek(begin)
            value = _tokens(shard, stream.read(end - begin))
            encoding = shard.column_encodings[shard.column_names.index("tokens")]
            if encoding != "bytes":
                ids = _array(encoding, value)
            else:
                dtype = dtype or _dtype(value, is_token)
                ids = np.frombuffer(value, dtype)
            yield f"{file}, sample {number}", ids
    except (ValueError, EOFError, IndexError, KeyError, AssertionError, zstandard.ZstdError) as error:
        raise ValueError(f"{file} is damaged ({in_one_line(error)}): copy it again") from error


def _unpacked(raw: BinaryIO, num_bytes: int) -> BinaryIO:
    data = io.BufferedReader(ZstdFile(raw), 1 << 20).read(num_bytes + 1)
    if len(data) != num_bytes:
        raise ValueError(f"it does not unpack to {num_bytes:,} bytes")
    return io.BytesIO(data)


def _tokens(shard: Shard, data: bytes) -> bytes:
    """Return the bytes of a sample's column `tokens`. The sizes of variable columns stand before the values."""
    place, sizes = 0, []
    for size in shard.column_sizes:
        if not size:
            size, place = int(np.frombuffer(data[place : place + 4], "<u4")[0]), place + 4
        sizes.append(size)
    number = shard.column_names.index("tokens")
    place += sum(sizes[:number])
    if place + sizes[number] > len(data):
        raise ValueError("a sample is shorter than its columns")
    return data[place : place + sizes[number]]


def _array(encoding: str, value: bytes) -> NDArray[np.integer]:
    from bd3_scale.data.mosaicml import mds_decode

    array = cast("NDArray[np.integer]", mds_decode(encoding, value))
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"`tokens` are {array.dtype} of {array.ndim} dimensions")
    return array


def _dtype(value: bytes, is_token: NDArray[np.bool_]) -> str:
    for dtype in _DTYPES:
        if len(value) % np.dtype(dtype).itemsize == 0:
            ids = np.frombuffer(value, dtype)
            if ids.size and ids.min() >= 0 and ids.max() < len(is_token):
                return dtype
    raise ValueError(f"its bytes are not ids below {len(is_token)} of 64, 32 or 16 bits: check --tokenizer")
