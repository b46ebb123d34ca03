"""Measure the share of padding in prepared data, and suggest options that lessen it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bd3_scale.data.manifest import SplitName
from bd3_scale.data.packing import Packing, best_fit
from bd3_scale.data.stored import StoredData

# Shares of all tokens: more is worth a note; a gain of less is not worth mentioning.
MUCH, LITTLE = 0.05, 0.01
# The size of the sample, which gives shares to about a percent, whatever the size of the data.
SHARDS, SEQUENCES = 8, 256


def waste_note(data: StoredData) -> str | None:
    """Return a line about the padding of the training (or held-out) split and options with less; None if it is small.

    In large data a sample of the sequences is measured, so shares are approximate. Raises as `StoredData`.
    """
    manifest, texts = data.manifest, _texts(data)
    if not len(texts):
        return None
    multiple, packing = manifest.document_multiple, manifest.packing
    share = waste(texts, manifest.seq_len, multiple, packing)
    if share <= MUCH:
        return None
    ways = []
    if packing == "best-fit":
        ways.append((waste(texts, manifest.seq_len, multiple, "concatenate"), "with --packing concatenate"))
    for smaller in (number for number in range(multiple - 1, 0, -1) if multiple % number == 0):
        ways.append((waste(texts, manifest.seq_len, smaller, packing), f"at --document-multiple {smaller}"))
        if ways[-1][0] <= MUCH:
            break
    gains = ", ".join(f"{left:.1%} {way}" for left, way in ways if left < share - LITTLE)
    return f"padding takes {share:.1%} of all tokens" + f"; it would take {gains}" * bool(gains)


def waste(texts: NDArray[np.int64], seq_len: int, multiple: int, packing: Packing) -> float:
    """Return the share of tokens that are neither text nor its EOS, if pieces of `texts` tokens are packed so."""
    units = -(-texts // multiple)
    if packing == "concatenate":
        tokens = int(units.sum()) * multiple
    else:
        tokens = len(best_fit(units.tolist(), seq_len // multiple)) * seq_len
    return 1 - int(texts.sum()) / tokens


def _texts(data: StoredData) -> NDArray[np.int64]:
    """Return the lengths of pieces of documents, from sequences all over a split."""
    split: SplitName = "validation" if data.manifest.train is None else "train"
    shards = data.shards(split)
    lengths = []
    for shard in map(shards.__getitem__, range(0, len(shards), -(-len(shards) // SHARDS))):
        sequences = data.sequences(split, shard, range(0, shard.samples, -(-shard.samples // SEQUENCES)))
        lengths.append(sequences.counted[sequences.counted > 0])
    return np.concatenate(lengths)
