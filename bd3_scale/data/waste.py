"""What padding takes of prepared data, and what would lessen that."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bd3_scale.data.manifest import SplitName
from bd3_scale.data.packing import Packing, best_fit
from bd3_scale.data.stored import StoredData

# Shares of all tokens: worth a word, and not worth one.
MUCH, LITTLE = 0.05, 0.01
# What is looked at, which tells shares to about a percent, whatever the size of the data.
SHARDS, SEQUENCES = 8, 256


def waste_note(data: StoredData) -> str | None:
    """Return a line on what padding takes of the training split (else of the held-out one), and what would help.

    None: it is little. Of large data some sequences are looked at, and the shares are about right. Raises as
    `StoredData`.
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
    told = ", ".join(f"{left:.1%} {way}" for left, way in ways if left < share - LITTLE)
    return f"padding takes {share:.1%} of all tokens" + f"; it would take {told}" * bool(told)


def waste(texts: NDArray[np.int64], seq_len: int, multiple: int, packing: Packing) -> float:
    """Return which share of all tokens is none of a text or its end, where pieces of `texts` tokens are packed so."""
    units = -(-texts // multiple)
    if packing == "concatenate":
        tokens = int(units.sum()) * multiple
    else:
        tokens = len(best_fit(units.tolist(), seq_len // multiple)) * seq_len
    return 1 - int(texts.sum()) / tokens


def _texts(data: StoredData) -> NDArray[np.int64]:
    """Return the tokens of pieces of documents, of sequences from all over a split."""
    split: SplitName = "validation" if data.manifest.train is None else "train"
    shards = data.shards(split)
    found = []
    for shard in map(shards.__getitem__, range(0, len(shards), -(-len(shards) // SHARDS))):
        sequences = data.sequences(split, shard, range(0, shard.samples, -(-shard.samples // SEQUENCES)))
        found.append(sequences.counted[sequences.counted > 0])
    return np.concatenate(found)
