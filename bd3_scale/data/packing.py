"""Documents into sequences of one length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Span = tuple[int, int]


@dataclass(frozen=True)
class PackedSequence:
    """Token ids [L], and the pieces of documents they consist of, in order.

    Piece i has `document_lengths[i]` tokens (int32, they sum to L), of which the first `counted_lengths[i]` count for
    perplexity: the text and the first end of document, but not the ends of document that pad behind it. Of all these,
    the tokens from `shown[r, 0]` up to `shown[r, 1]` of each run r (int32 [R, 2], in order, R ≥ 1) are shown: never
    masked, trained on or counted.
    """

    tokens: NDArray[np.unsignedinteger]
    document_lengths: NDArray[np.int32]
    counted_lengths: NDArray[np.int32]
    shown: NDArray[np.int32]

    @property
    def num_shown(self) -> int:
        """Tokens that are shown."""
        return int((self.shown[:, 1] - self.shown[:, 0]).sum())

    @property
    def num_counted(self) -> int:
        """Tokens that count for perplexity."""
        if not self.num_shown:
            return int(self.counted_lengths.sum())
        starts = np.cumsum(self.document_lengths) - self.document_lengths
        counted = np.zeros(len(self.tokens), np.bool_)
        for start, length in zip(starts, self.counted_lengths, strict=True):
            counted[start : start + length] = True
        for first, last in self.shown:
            counted[first:last] = False
        return int(counted.sum())


class Packer:
    """Fills sequences of `seq_len` tokens with documents, greedily and in order.

    Each document is ended by EOS and padded with EOS to a multiple of `document_multiple`; it is cut only where a
    sequence ends. `seq_len` is a multiple of `document_multiple`, so the length of every piece is one, too.
    """

    def __init__(self, seq_len: int, document_multiple: int, eos_id: int, dtype: type[np.unsignedinteger]) -> None:
        assert seq_len % document_multiple == 0
        self.seq_len = seq_len
        self._document_multiple, self._eos_id = document_multiple, eos_id
        self._tokens = np.empty(seq_len, dtype)
        self._document_lengths: list[int] = []
        self._counted_lengths: list[int] = []
        self._shown: list[tuple[int, int]] = []

    @property
    def num_pending(self) -> int:
        """Tokens in the sequence that is not complete yet."""
        return sum(self._document_lengths)

    def add(
        self,
        ids: Sequence[int] | NDArray[np.unsignedinteger],
        shown: Sequence[Span] = (),
        *,
        trains_end: bool = True,
    ) -> Iterator[PackedSequence]:
        """Append a document, given without its EOS; yields the sequences that it completes.

        shown: runs of its tokens that are shown, in order. trains_end: its end and what pads it are trained on; else
        they are shown, too.
        """
        num_counted = len(ids) + 1
        num_padded = -(-num_counted // self._document_multiple) * self._document_multiple
        document = np.full(num_padded, self._eos_id, self._tokens.dtype)
        document[: len(ids)] = ids
        runs = [*shown, *([] if trains_end else [(len(ids), num_padded)])]
        start = 0
        while start < num_padded:
            length = min(num_padded - start, self.seq_len - self.num_pending)
            place = self.num_pending - start
            inside = ((max(first, start), min(last, start + length)) for first, last in runs)
            self._shown += [(first + place, last + place) for first, last in inside if first < last]
            yield from self._append(document[start : start + length], min(num_counted - start, length))
            start += length

    def fill(self) -> Iterator[PackedSequence]:
        """Complete the pending sequence, if there is one, with a piece of EOS of which nothing counts."""
        if self.num_pending:
            yield from self._append(np.full(self.seq_len - self.num_pending, self._eos_id, self._tokens.dtype), 0)

    def _append(self, piece: NDArray[np.unsignedinteger], num_counted: int) -> Iterator[PackedSequence]:
        self._tokens[self.num_pending :][: len(piece)] = piece
        self._document_lengths.append(len(piece))
        self._counted_lengths.append(num_counted)
        if self.num_pending == self.seq_len:
            lengths, counted = np.array(self._document_lengths, np.int32), np.array(self._counted_lengths, np.int32)
            # One that is empty where there is none: MDS holds no array without elements.
            shown = np.array(self._shown or [(0, 0)], np.int32)
            yield PackedSequence(self._tokens.copy(), lengths, counted, shown)
            self._document_lengths, self._counted_lengths, self._shown = [], [], []
