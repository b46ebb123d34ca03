"""Read documents of ids from Megatron's `.bin`; its index `.idx` is memory-mapped and read in pieces."""

from __future__ import annotations

import bisect
import itertools
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from bd3_scale.data.sources import Part
from bd3_scale.resilience.readers import open_regular

MAGIC = b"MMIDIDX\x00\x00"
_HEAD = struct.Struct("<9sQBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
# How many documents' bounds are read at once.
_DOCUMENTS = 1 << 14


class _Index:
    """The index of a `.bin`: `lengths` and `places` in bytes of sequences [S], `first` sequences of documents [D + 1].

    ValueError: it is not an index, or not the index of this file.
    """

    def __init__(self, file: Path) -> None:
        path = file.with_suffix(".idx")
        with open_regular(path) as stream:
            head, size = stream.read(_HEAD.size), path.stat().st_size
        if len(head) < _HEAD.size or not head.startswith(MAGIC):
            raise ValueError(f"{path} is not an index of Megatron (`MMIDIDX`): name the .bin of a corpus with an .idx")
        _, version, code, num_sequences, num_documents = _HEAD.unpack(head)
        if version != 1 or code not in _DTYPES:
            raise ValueError(
                f"{path} is of version {version} with ids of kind {code}; only version 1 with integers can be read"
            )
        needed = _HEAD.size + 12 * num_sequences + 8 * num_documents
        if size not in (needed, needed + num_sequences) or not num_sequences or num_documents < 2:
            raise ValueError(f"{path} is damaged: {size:,} bytes, where {needed:,} are needed; copy it again")
        data = np.memmap(path, np.uint8, "r")
        ends = np.cumsum([_HEAD.size, 4 * num_sequences, 8 * num_sequences, 8 * num_documents])
        self.path, self.dtype = path, np.dtype(_DTYPES[code])
        self.lengths: NDArray[np.int32] = data[ends[0] : ends[1]].view("<i4")
        self.places: NDArray[np.int64] = data[ends[1] : ends[2]].view("<i8")
        self.first: NDArray[np.int64] = data[ends[2] : ends[3]].view("<i8")

    def place(self, document: int) -> int:
        """Return the offset of a document in the `.bin`."""
        first = int(self.first[document])
        if not 0 <= first <= len(self.places):
            raise ValueError(f"{self.path} is damaged: document {document} begins with sequence {first}; copy it again")
        return int(self.places[first]) if first < len(self.places) else 1 << 63


def files(sources: Iterable[Path]) -> list[Path]:
    """Return the `.bin` files of sources, which may be named with `.bin`, `.idx` or no suffix.

    FileNotFoundError: a file or its index is missing; ValueError: an index is invalid.
    """
    result = []
    for source in sources:
        has_suffix = source.suffix in (".bin", ".idx")
        file = source.with_suffix(".bin") if has_suffix else source.with_name(f"{source.name}.bin")
        for path in (file, file.with_suffix(".idx")):
            if not path.is_file():
                raise FileNotFoundError(f"{path} does not exist: a corpus of Megatron is a .bin with its .idx")
        _Index(file)
        result.append(file)
    return result


def documents(
    file: Path, raw: BinaryIO, part: Part | None, max_tokens: int
) -> Iterator[tuple[str, NDArray[np.integer]]]:
    """Yield each document that begins in a part of `file`, opened as `raw`: where it stands, and its ids.

    ValueError: file or index is damaged, or a document has more than `max_tokens`.
    """
    index = _Index(file)
    count = len(index.first) - 1
    first, last = (bisect.bisect_left(range(count), byte, key=index.place) for byte in part or (0, 1 << 63))
    place = index.place(first) if first < last else 0
    raw.seek(min(place, file.stat().st_size))
    for start in range(first, last, _DOCUMENTS):
        bounds = index.first[start : min(start + _DOCUMENTS, last) + 1].tolist()
        for document, (begin, end) in enumerate(itertools.pairwise(bounds), start):
            where = f"{file}, document {document}"
            if not 0 <= begin <= end <= len(index.lengths):
                raise ValueError(
                    f"{where} is damaged: sequences {begin} to {end} of {len(index.lengths)}; copy it again"
                )
            lengths = index.lengths[begin:end].astype(np.int64)
            size = int(lengths.sum())
            if size > max_tokens:
                raise ValueError(f"{where} has {size:,} tokens, and {max_tokens:,} are allowed; split it")
            places = place + index.dtype.itemsize * (np.cumsum(lengths) - lengths)
            if np.any(lengths < 0) or not np.array_equal(index.places[begin:end], places):
                raise ValueError(f"{where} does not follow the one before it; copy {index.path} again")
            data = raw.read(size * index.dtype.itemsize)
            if len(data) < size * index.dtype.itemsize:
                raise ValueError(f"{where} is cut short; copy the file again")
            place += len(data)
            yield where, np.frombuffer(data, index.dtype)
