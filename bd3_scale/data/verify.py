"""Verify prepared data: files against indices, sequences against the manifest."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from bd3_scale.data.index import INDEX_FILE, ShardTable
from bd3_scale.data.manifest import Manifest, Split, SplitName, check_tokenizer
from bd3_scale.data.overlap import hashes_file, read_hashes
from bd3_scale.data.statistics import Statistics
from bd3_scale.data.stored import Sequences, StoredData

Progress = Callable[[int, int], object]


def problems(data: StoredData, progress: Progress = lambda done, total: None) -> Iterator[str]:
    """Yield the problems of prepared data, each in one line; nothing if they are sound.

    Every shard is read. Size and hashes must be those of the index, tokens and document bounds must be valid. Then the
    counts of the manifest and the hashes of documents are checked. In a folder of this machine, also files that no
    index names are reported. `progress` gets the number of shards read so far and of all shards.

    Raises FileNotFoundError if there is no manifest, ValueError if it is invalid.
    """
    manifest = data.manifest
    yield from _tokenizer_problems(data)
    shards: dict[SplitName, ShardTable] = {}
    for name in manifest.splits:
        try:
            shards[name] = data.shards(name)
        except (ValueError, OSError) as error:
            yield str(error)
    total, done = sum(map(len, shards.values())), 0
    for name, listed in shards.items():
        statistics, damaged = Statistics(manifest), False
        for shard in listed:
            try:
                sequences = data.sequences(name, shard)
            except (ValueError, OSError) as error:
                damaged = True
                yield str(error)
            else:
                statistics.add(sequences)
                yield from (
                    f"{data.place}/{name}/{shard.stored.basename}: {what}" for what in _wrong(sequences, manifest)
                )
            done += 1
            progress(done, total)
        place = f"{data.place}/{name}"
        if not damaged:
            yield from (f"{place}: {what}" for what in _differing_counts(manifest.splits[name], statistics))
        if Path(place).is_dir():
            yield from _strange_files(Path(place), listed)
            yield from _hash_problems(Path(data.place), name, manifest.splits[name])


def _tokenizer_problems(data: StoredData) -> Iterator[str]:
    try:
        check_tokenizer(data.manifest, data.tokenizer)
    except (ValueError, OSError) as error:
        yield f"{data.place}: {error}"
        return
    for name in ("size", "eos_id", "mask_id"):
        expected, actual = (getattr(one, name) for one in (data.manifest.vocabulary, data.tokenizer.vocabulary))
        if expected != actual:
            yield f"{data.place}: {name} of the vocabulary is {actual}, and the manifest says {expected}"


def _wrong(sequences: Sequences, manifest: Manifest) -> Iterator[str]:
    """Yield what no sequence of such data may have, with the first sequence that has it."""
    vocabulary, multiple = manifest.vocabulary, manifest.document_multiple
    if sequences.tokens.shape[1] != manifest.seq_len:
        yield f"its sequences have {sequences.tokens.shape[1]} tokens, and the manifest says {manifest.seq_len}"
        return
    rows = np.repeat(np.arange(len(sequences)), sequences.pieces)
    for wrong, what in (
        ((sequences.tokens >= vocabulary.size).any(1), f"an id outside the vocabulary of {vocabulary.size}"),
        ((sequences.tokens == vocabulary.mask_id).any(1), f"the id of the mask, {vocabulary.mask_id}"),
        (
            (~sequences.is_text & (sequences.tokens != vocabulary.eos_id)).any(1),
            "padding that is not the end of document",
        ),
        (rows[sequences.lengths % multiple > 0], f"a document whose length is no multiple of {multiple}"),
    ):
        numbers = np.flatnonzero(wrong) if wrong.dtype == np.bool_ else wrong
        if len(numbers):
            yield f"sequence {numbers[0]} has {what} (of {len(sequences)}, {len(set(numbers.tolist()))} do)"


def _differing_counts(split: Split, statistics: Statistics) -> Iterator[str]:
    for what, expected, counted in (
        ("sequences", split.sequences, statistics.sequences),
        ("tokens that count", split.counted_tokens, statistics.counted_tokens),
        ("tokens that are shown", split.shown_tokens, statistics.shown_tokens),
    ):
        if expected != counted:
            yield f"{counted:,} {what}, and the manifest says {expected:,}"
    # The last training documents may be dropped, and documents that spell EOS have more than one end.
    plain = not (statistics.manifest.parse_special or statistics.manifest.messages)
    if plain and (
        statistics.ends > split.documents or (statistics.ends < split.documents and not split.dropped_tokens)
    ):
        yield f"{statistics.ends:,} ends of documents, and the manifest says {split.documents:,}"


def _strange_files(folder: Path, listed: ShardTable) -> Iterator[str]:
    known = {INDEX_FILE, *(file.basename for shard in listed for file in (shard.raw_data, shard.zip_data) if file)}
    # Hidden names belong to running readers, or to killed ones.
    for name in sorted(name for name in os.listdir(folder) if name not in known and not name.startswith(".")):
        yield f"{folder / name}: no index names it"


def _hash_problems(folder: Path, name: SplitName, split: Split) -> Iterator[str]:
    place = folder / hashes_file(name)
    hashes = read_hashes(folder, name)
    if hashes is None:  # prepared before hashes were stored
        return
    if place.stat().st_size % 8:
        yield f"{place}: its size is no multiple of 8 bytes"
    if (hashes[1:] <= hashes[:-1]).any():
        yield f"{place}: its hashes are not sorted, or one is there twice"
    if len(hashes) > split.documents:
        yield f"{place}: {len(hashes):,} documents, and the manifest says {split.documents:,}"
