"""Whether a model was trained on a document: the hashes of all documents lie beside the prepared data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bd3_scale.data.manifest import SplitName


def document_hash(text: str) -> int:
    """64 bits of BLAKE2b over the text, whatever its white space."""
    return int.from_bytes(hashlib.blake2b(" ".join(text.split()).encode(), digest_size=8).digest(), "little")


def hashes_file(split: SplitName) -> str:
    """Name of the file in the folder of prepared data."""
    return f"{split}-documents.u64"


def write_hashes(folder: Path, split: SplitName, hashes: Iterable[int]) -> None:
    """The sorted hashes of a split's documents, uint64 little-endian, eight bytes a document."""
    np.unique(np.fromiter(hashes, dtype="<u8")).tofile(folder / hashes_file(split))


def read_hashes(folder: Path, split: SplitName) -> NDArray[np.uint64] | None:
    """None: data prepared elsewhere, or before hashes were kept."""
    path = folder / hashes_file(split)
    return np.fromfile(path, dtype="<u8") if path.is_file() else None


def count_known(known: NDArray[np.uint64], found: NDArray[np.uint64]) -> int:
    """How many of the documents of hashes `found` are among those of hashes `known`."""
    return int(np.isin(found, known).sum())


def hashes_of(texts: Iterable[str]) -> NDArray[np.uint64]:
    """Of each text."""
    return np.fromiter((document_hash(text) for text in texts), dtype="<u8")
