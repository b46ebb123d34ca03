"""Read prepared data from a folder or an object store, without streaming: nothing is written next to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

from bd3_scale.data.index import INDEX_FILE, INDEX_LIMIT, SHARD_LIMIT, Shard, ShardFile, ShardTable, parse_index
from bd3_scale.data.manifest import MANIFEST_FILE, Manifest, SplitName, parse_manifest
from bd3_scale.data.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer
from bd3_scale.recipe.load import load_recipe
from bd3_scale.recipe.schema import DATA_RETRY_MINUTES
from bd3_scale.resilience.leftovers import temporary_folder
from bd3_scale.resilience.readers import LIMIT_BYTES, read_regular, reader

RECIPES = (".yaml", ".yml")


@dataclass(frozen=True)
class Store:
    """Access to files of an object store: streaming's `downloader` for it, and how long to retry, see `fetch`."""

    downloader: Any
    retry_minutes: float


@dataclass(frozen=True)
class StoredData:
    """The data in a folder or at an address of an object store, `place`; a store is retried for `retry_minutes`.

    Raises FileNotFoundError for missing files, ValueError for damaged ones, each with the file's name; from an object
    store OSError as `with_retries`.
    """

    place: str
    retry_minutes: float = DATA_RETRY_MINUTES

    @cached_property
    def manifest(self) -> Manifest:
        """Return their manifest, without the shards."""
        return parse_manifest(f"{self.place}/{MANIFEST_FILE}", self.read(MANIFEST_FILE))

    @cached_property
    def store(self) -> Store | None:
        """Return the object store that holds them, or None if they are in a folder."""
        if "://" not in self.place:
            return None
        from bd3_scale.data.mosaicml import CloudDownloader

        return Store(CloudDownloader.get(self.place), self.retry_minutes)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Return the tokeniser that is stored with them."""
        if self.store is None:
            return load_tokenizer(self.place)
        with temporary_folder("tokenizer") as scratch:
            for name in TOKENIZER_FILES:
                (scratch / name).write_bytes(self.read(name))
            return load_tokenizer(scratch)

    def shards(self, split: SplitName) -> ShardTable:
        """Return the shards in the split's index."""
        name = f"{split}/{INDEX_FILE}"
        return parse_index(f"{self.place}/{name}", self.read(name, INDEX_LIMIT))

    def sequences(self, split: SplitName, shard: Shard, numbers: Sequence[int] | None = None) -> Sequences:
        """Return sequences of a shard (default: all), after checking its size and hash."""
        return read_sequences(f"{self.place}/{split}/{shard.stored.basename}", shard, numbers, self.store)

    def read(self, name: str, limit: int = LIMIT_BYTES) -> bytes:
        """Return the bytes of one of the files."""
        return read_stored(f"{self.place}/{name}", limit, self.store)


def stored_data(names: Iterable[str]) -> Iterator[StoredData]:
    """Yield the data that a person names: by a folder, an address, or a recipe that trains on them."""
    for name in names:
        if Path(name).suffix in RECIPES:
            for source in load_recipe(name).data.by_source.values():
                yield StoredData(source.remote or source.path, source.retry_minutes)
        else:
            yield StoredData(name.rstrip("/") or name)


@dataclass(frozen=True)
class Sequences:
    """N sequences of L tokens, which consist of P pieces of documents, in order.

    tokens [N, L], as stored. pieces [N] int64: the number of pieces of each sequence. lengths, counted [P] int64: the
    tokens of each piece, and how many of them are text and its EOS. shown [R, 3] int64: sequence, first and last + 1 of
    runs of shown tokens, in order.
    """

    tokens: NDArray[np.unsignedinteger]
    pieces: NDArray[np.int64]
    lengths: NDArray[np.int64]
    counted: NDArray[np.int64]
    shown: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Return where each piece begins, counted over all tokens [N · L]."""
        return np.cumsum(self.lengths) - self.lengths

    def ends_document(self, eos_id: int) -> NDArray[np.bool_]:
        """Return bool [P]: the piece ends its document and is not cut. False for filling."""
        last = self.starts + np.maximum(self.counted, 1) - 1
        return (self.counted > 0) & (self.tokens.reshape(-1)[last] == eos_id)

    @cached_property
    def is_text(self) -> NDArray[np.bool_]:
        """Return bool [N, L]: the token is text or its EOS, not padding."""
        return self._marked(self.starts, self.starts + self.counted)

    @cached_property
    def is_shown(self) -> NDArray[np.bool_]:
        """Return bool [N, L]: the token is shown."""
        first, last = (self.shown[:, 0] * self.tokens.shape[1] + self.shown[:, column] for column in (1, 2))
        return self._marked(first, last)

    def _marked(self, first: NDArray[np.int64], last: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return bool [N, L], true inside runs that do not overlap, given by positions over all tokens."""
        steps = np.zeros(self.tokens.size + 1, np.int8)
        np.add.at(steps, first, 1)
        np.add.at(steps, last, -1)
        return np.cumsum(steps[:-1], dtype=np.int8).astype(np.bool_).reshape(self.tokens.shape)


@reader("a shard", path="place")
def read_sequences(
    place: str, shard: Shard, numbers: Sequence[int] | None = None, store: Store | None = None
) -> Sequences:
    """Return sequences (default: all) of a shard, whose file is at `place` in a `store` or a folder.

    Raises as `read_stored`, and ValueError if the file is not what its index says, or holds no sequences.
    """
    content = read_stored(place, SHARD_LIMIT, store, partial(_checked, file=shard.stored))
    if shard.zip_data is not None:
        # Checked before unpacking: a few kilobytes could otherwise fill the memory.
        if zstandard.frame_content_size(content) != shard.raw_data.bytes:
            raise ValueError(
                f"{place} is damaged: it does not unpack to the {shard.raw_data.bytes:,} bytes of its index"
            )
        with _damage_of(f"{place}, unpacked,"):
            content = _checked(zstandard.ZstdDecompressor().decompress(content), shard.raw_data)
    sequences = _sequences(content, shard, numbers)
    if problem := _problem(sequences, range(shard.samples) if numbers is None else numbers):
        raise ValueError(f"{place} is damaged: {problem}")
    return sequences


def _sequences(content: bytes, shard: Shard, numbers: Sequence[int] | None) -> Sequences:
    from bd3_scale.data.mosaicml import reader_from_json  # imports torch

    header = np.frombuffer(content, "<u4", shard.samples + 2).tolist()
    if header[0] != shard.samples or header[-1] != len(content):
        raise ValueError(f"it does not hold {shard.samples} sequences")
    decode = reader_from_json("", "", shard.model_dump()).decode_sample
    numbers = range(shard.samples) if numbers is None else numbers
    samples = [decode(content[header[i + 1] : header[i + 2]]) for i in numbers]
    for number, sample in zip(numbers, samples, strict=True):
        if (
            not sample["document_lengths"].ndim == 1
            or sample["document_lengths"].shape != sample["counted_lengths"].shape
        ):
            raise ValueError(f"sequence {number} has not as many document_lengths as counted_lengths")
    shown = [(row, *run) for row, sample in enumerate(samples) for run in sample.get("shown", ()) if run[0] < run[1]]
    return Sequences(
        tokens=np.stack([sample["tokens"] for sample in samples]),
        pieces=np.array([len(sample["document_lengths"]) for sample in samples]),
        lengths=np.concatenate([sample["document_lengths"] for sample in samples]).astype(np.int64),
        counted=np.concatenate([sample["counted_lengths"] for sample in samples]).astype(np.int64),
        shown=np.array(shown, np.int64).reshape(-1, 3),
    )


def _problem(sequences: Sequences, numbers: Sequence[int]) -> str | None:
    """Return what is wrong with the bounds of documents and in which sequence, or None."""
    seq_len = sequences.tokens.shape[1]
    row = np.repeat(np.arange(len(sequences)), sequences.pieces)
    sums = np.bincount(row, sequences.lengths, len(sequences))
    _, first, last = sequences.shown.T
    in_order = np.ones(len(sequences.shown), np.bool_)
    in_order[1:] = (sequences.shown[1:, 0] > sequences.shown[:-1, 0]) | (first[1:] >= last[:-1])
    for wrong, what in (
        (np.flatnonzero(sums != seq_len), f"document_lengths that do not add up to {seq_len}"),
        (row[sequences.lengths < 1], "a document without tokens"),
        (
            row[(sequences.counted < 0) | (sequences.counted > sequences.lengths)],
            "more counted tokens than its document has",
        ),
        (sequences.shown[(first < 0) | (last > seq_len) | ~in_order, 0], "shown runs outside it, or not in order"),
    ):
        if len(wrong):
            return f"sequence {numbers[wrong[0]]} has {what}"
    return None


def _checked(content: bytes, file: ShardFile) -> bytes:
    """Return `content`. ValueError: its size or hash differs from `file`."""
    if len(content) != file.bytes:
        raise ValueError(f"it has {len(content):,} bytes, and its index says {file.bytes:,}; copy it again")
    if (digest := xxhash.xxh64_hexdigest(content)) != file.hashes.xxh64:
        raise ValueError(f"its hash is {digest}, and its index says {file.hashes.xxh64}; copy it again")
    return content


@contextmanager
def _damage_of(place: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place} is damaged: {error}") from error


@reader("prepared data", path="place")
def read_stored(place: str, limit: int, store: Store | None = None, checked: Callable[[bytes], bytes] = bytes) -> bytes:
    """Return the bytes of a file of prepared data, through `checked`, which raises ValueError if they are damaged.

    store: the store of `place`; None: a folder. Raises FileNotFoundError: the file is missing. ValueError: it is larger
    than `limit`, damaged, or not a regular file. From a store OSError as `with_retries`.
    """
    if store is None:
        try:
            content = read_regular(Path(place), limit)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{place} is missing: name a folder of prepared data, or copy it again") from error
        with _damage_of(place):
            return checked(content)
    from bd3_scale.data.remote import fetch

    with temporary_folder("fetched") as scratch:
        return fetch(place, scratch / "file", checked, limit, store.retry_minutes, store.downloader)
