"""Describe prepared data, and show sequences of them as text."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from typing import Any

import numpy as np

from bd3_scale.data.manifest import SplitName
from bd3_scale.data.stored import Sequences, StoredData


def description(data: StoredData) -> dict[str, Any]:
    """Return what manifest, tokeniser and indices of prepared data say, as JSON values.

    Raises as `StoredData`.
    """
    manifest = data.manifest
    names = {what: getattr(manifest.vocabulary, f"{what}_id") for what in ("eos", "mask", "bos")}
    content = manifest.model_dump(mode="json", exclude={"train", "validation", "sources"})
    content["data"] = data.place
    content["packing"] = manifest.packing
    content["special_tokens"] = {
        what: data.tokenizer.name_of(token_id) for what, token_id in names.items() if token_id is not None
    }
    content["sources"] = [source.model_dump() for source in manifest.sources]
    content["splits"] = {}
    for name, split in manifest.splits.items():
        shards = data.shards(name)
        content["splits"][name] = split.model_dump(mode="json", exclude={"shards"}) | {
            "tokens": split.sequences * manifest.seq_len,
            "shown_tokens": split.shown_tokens,
            "shards": len(shards),
            "bytes": shards.stored_bytes,
            "unpacked_bytes": int(shards.rows["raw_bytes"].sum(dtype=np.int64)),
        }
    return content


def sampled(
    data: StoredData, split: SplitName, number: int, seed: int, ids: Sequence[int] = ()
) -> Iterator[dict[str, Any]]:
    """Yield sequences as text, in order, as JSON values: `ids`, or `number` random ones, drawn with `seed`.

    Each has its `id` and its `documents`. A document has its number of `tokens`, how many of them are `padding`,
    whether it is `cut` at its end, and its text as `runs`, each of which is `shown` or not.
    Raises as `StoredData`; ValueError: no such split or id.
    """
    if split not in data.manifest.splits:
        raise ValueError(f"{data.place} has no {split} split")
    shards = data.shards(split)
    firsts = np.cumsum([0, *shards.rows["samples"].tolist()]).tolist()
    if wrong := [i for i in ids if not 0 <= i < firsts[-1]]:
        raise ValueError(f"{data.place} has no sequence {wrong[0]} in {split}: the last is {firsts[-1] - 1}")
    chosen = sorted(ids or random.Random(seed).sample(range(firsts[-1]), min(number, firsts[-1])))
    for place, here in groupby(chosen, lambda i: bisect_right(firsts, i) - 1):
        numbers = list(here)
        sequences = data.sequences(split, shards[place], [i - firsts[place] for i in numbers])
        documents = iter(_documents(data, sequences))
        for i, pieces in zip(numbers, sequences.pieces.tolist(), strict=True):
            yield {"id": i, "documents": list(islice(documents, pieces))}


def _documents(data: StoredData, sequences: Sequences) -> Iterator[dict[str, Any]]:
    tokens, shown = sequences.tokens.reshape(-1), sequences.is_shown.reshape(-1)
    ends = sequences.ends_document(data.manifest.vocabulary.eos_id)
    for start, length, counted, end in zip(sequences.starts, sequences.lengths, sequences.counted, ends, strict=True):
        ids, flags = (values[start : start + counted].tolist() for values in (tokens, shown))
        runs, end_of_run = [], 0
        for is_shown, run in groupby(flags):
            before, end_of_run = ids[:end_of_run], end_of_run + len(list(run))
            new = ids[len(before) : end_of_run]
            text = data.tokenizer.continuation(before, new) if before else data.tokenizer.decode(new)
            runs.append({"text": text, "shown": is_shown})
        cut = bool(counted and not end)
        yield {"tokens": int(length), "padding": int(length - counted), "cut": cut, "runs": runs}
