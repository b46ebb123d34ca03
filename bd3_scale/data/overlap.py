"""Whether a model was trained on a document: the hashes of all training documents lie beside the prepared data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

HASHES_FILE = "documents.u64"


def document_hash(text: str) -> int:
    """64 bits of BLAKE2b over the text, whatever its white space."""
    return int.from_bytes(hashlib.blake2b(" ".join(text.split()).encode(), digest_size=8).digest(), "little")


def write_hashes(folder: Path, hashes: Iterable[int]) -> None:
    """The sorted hashes of training documents, uint64 little-endian, eight bytes a document."""
    np.unique(np.fromiter(hashes, dtype="<u8")).tofile(folder / HASHES_FILE)


def read_hashes(folder: Path) -> NDArray[np.uint64] | None:
    """None: data prepared elsewhere, or before hashes were kept."""
    path = folder / HASHES_FILE
    return np.fromfile(path, dtype="<u8") if path.is_file() else None


def count_known(known: NDArray[np.uint64], texts: Iterable[str]) -> int:
    """How many of `texts` are among the documents whose hashes are `known`."""
    found = np.fromiter((document_hash(text) for text in texts), dtype="<u8")
    return int(np.isin(found, known).sum())
