"""Count what prepared sequences consist of: text, padding, documents and their cuts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bd3_scale.data.manifest import Manifest, SplitName
from bd3_scale.data.stored import Sequences, StoredData

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


@dataclass
class Statistics:
    """Counts of the sequences of one split, which must be added in order.

    Concatenated documents are followed over the sequences that they are cut into. With best-fit packing, each piece of
    a document that is longer than a sequence counts as a document. Where preparation dropped a sequence, the documents
    before and after it count as one.
    """

    manifest: Manifest
    sequences: int = 0
    text_tokens: int = 0
    shown_tokens: int = 0
    counted_tokens: int = 0
    padding_tokens: int = 0
    filling_tokens: int = 0
    ends: int = 0
    cuts: int = 0
    fitting_documents: int = 0
    fitting_documents_cut: int = 0
    # By length in tokens: the number of documents; by number of documents in a sequence: the number of sequences.
    document_lengths: Counter[int] = field(default_factory=Counter)
    documents_a_sequence: Counter[int] = field(default_factory=Counter)
    # The document that the last sequence left open: tokens of text, tokens with padding, pieces.
    _open: tuple[int, int, int] = (0, 0, 0)

    def add(self, sequences: Sequences) -> None:
        """Add the sequences that follow."""
        is_piece, ends = sequences.counted > 0, sequences.ends_document(self.manifest.vocabulary.eos_id)
        text, shown = sequences.is_text, sequences.is_shown
        self.sequences += len(sequences)
        self.text_tokens += int(sequences.counted.sum())
        self.shown_tokens += int(shown.sum())
        self.counted_tokens += int((text & ~shown).sum())
        self.padding_tokens += int((sequences.lengths - sequences.counted)[is_piece].sum())
        self.filling_tokens += int(sequences.lengths[~is_piece].sum())
        self.ends += int(ends.sum())
        self.cuts += int((is_piece & ~ends).sum())
        rows = np.repeat(np.arange(len(sequences)), sequences.pieces)
        self.documents_a_sequence.update(np.bincount(rows, is_piece, len(sequences)).astype(int).tolist())
        self._add_documents(sequences.counted[is_piece], sequences.lengths[is_piece], ends[is_piece])

    def finish(self) -> None:
        """Add the document that the end of the split cuts, if there is one."""
        if self._open[2]:
            text, length, pieces = (np.array([value]) for value in self._open)
            self._add_lengths(text, length, pieces, np.array([False]))
        self._open = (0, 0, 0)

    def _add_documents(self, counted: NDArray[np.int64], lengths: NDArray[np.int64], ends: NDArray[np.bool_]) -> None:
        if not len(ends):
            return
        closes = ends if self.manifest.packing == "concatenate" else np.ones_like(ends)
        document: NDArray[np.int64] = np.cumsum(closes) - closes
        ones = np.ones_like(counted)
        sums = [np.bincount(document, values).astype(np.int64) for values in (counted, lengths, ones)]
        for total, before in zip(sums, self._open, strict=True):
            total[0] += before
        self._open = (0, 0, 0)
        if not closes[-1]:
            text, length, pieces = (int(total[-1]) for total in sums)
            self._open = (text, length, pieces)
            sums = [total[:-1] for total in sums]
        self._add_lengths(sums[0], sums[1], sums[2], ends[closes])

    def _add_lengths(
        self,
        text: NDArray[np.int64],
        length: NDArray[np.int64],
        pieces: NDArray[np.int64],
        is_whole: NDArray[np.bool_],
    ) -> None:
        fits = is_whole & (length <= self.manifest.seq_len)
        self.fitting_documents += int(fits.sum())
        self.fitting_documents_cut += int((fits & (pieces > 1)).sum())
        self.document_lengths.update(text.tolist())

    def summary(self) -> dict[str, Any]:
        """Return the counts and quantiles, as JSON values."""
        return {
            "sequences": self.sequences,
            "tokens": self.sequences * self.manifest.seq_len,
            "text_tokens": self.text_tokens,
            "counted_tokens": self.counted_tokens,
            "shown_tokens": self.shown_tokens,
            "padding_tokens": self.padding_tokens,
            "filling_tokens": self.filling_tokens,
            "document_ends": self.ends,
            "cuts": self.cuts,
            "fitting_documents": self.fitting_documents,
            "fitting_documents_cut": self.fitting_documents_cut,
            "document_tokens": summarised(self.document_lengths),
            "documents_a_sequence": summarised(self.documents_a_sequence),
        }


def summarised(counts: Mapping[int, int]) -> dict[str, float]:
    """Return mean and quantiles (the smallest value that so large a share does not exceed) of counted values.

    ValueError: there is no value.
    """
    if not counts:
        raise ValueError("the sequences hold no document: prepare the data again")
    values = np.array(sorted(counts))
    below = np.cumsum([counts[value] for value in values.tolist()])
    places = np.searchsorted(below, [max(1.0, quantile * below[-1]) for quantile in QUANTILES])
    quantiles = {f"{quantile:.0%}": int(values[place]) for quantile, place in zip(QUANTILES, places, strict=True)}
    return {"mean": sum(value * count for value, count in counts.items()) / int(below[-1]), **quantiles}


def statistics(
    data: StoredData, split: SplitName, progress: Callable[[int, int], object] = lambda done, total: None
) -> Statistics:
    """Return the statistics of a split; `progress` gets the number of shards read so far and of all shards.

    Raises as `StoredData`.
    """
    result = Statistics(data.manifest)
    shards = data.shards(split)
    for number, shard in enumerate(shards, 1):
        result.add(data.sequences(split, shard))
        progress(number, len(shards))
    result.finish()
    return result
