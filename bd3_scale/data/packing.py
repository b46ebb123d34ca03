"""Documents into sequences of one length."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Span = tuple[int, int]
Packing = Literal["concatenate", "best-fit"]
# What best-fit packs at once, of one split: 64 MB of tokens at the most, and some hundred bytes a document besides.
RUN_PIECES = 1 << 16
RUN_TOKENS = 1 << 24


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


class _Piece(NamedTuple):
    """Of one document: its tokens, how many of them count, and runs of them that are shown."""

    tokens: NDArray[np.unsignedinteger]
    num_counted: int
    shown: list[Span]


class Packer:
    """Fills sequences of `seq_len` tokens with documents, one after the other and in order.

    Each document is ended by EOS and padded with EOS to a multiple of `document_multiple`; it is cut only where a
    sequence ends. `seq_len` is a multiple of `document_multiple`, so the length of every piece is one, too. What fills
    a sequence behind its last document does not count; with `shows_filling` it is not trained on, either.
    """

    def __init__(
        self,
        seq_len: int,
        document_multiple: int,
        eos_id: int,
        dtype: type[np.unsignedinteger],
        *,
        shows_filling: bool = False,
    ) -> None:
        assert seq_len % document_multiple == 0
        self.seq_len = seq_len
        self._document_multiple, self._eos_id, self._dtype = document_multiple, eos_id, dtype
        self._shows_filling = shows_filling
        self._pieces: list[_Piece] = []
        # Tokens of documents that no sequence has yet.
        self.num_pending = 0

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
        for piece in self._cut(ids, shown, trains_end, self.seq_len - self.num_pending):
            self._pieces.append(piece)
            self.num_pending += len(piece.tokens)
            if self.num_pending == self.seq_len:
                yield from self.fill()

    def fill(self) -> Iterator[PackedSequence]:
        """Complete what is pending, if anything is, with pieces of EOS of which nothing counts."""
        if self._pieces:
            yield self._sequence(self._pieces)
            self._pieces, self.num_pending = [], 0

    def _cut(
        self, ids: Sequence[int] | NDArray[np.unsignedinteger], shown: Sequence[Span], trains_end: bool, first: int
    ) -> Iterator[_Piece]:
        """Yield a document's pieces: of `first` tokens, of `seq_len` each, and what is left."""
        num_counted = len(ids) + 1
        num_padded = -(-num_counted // self._document_multiple) * self._document_multiple
        document = np.full(num_padded, self._eos_id, self._dtype)
        document[: len(ids)] = ids
        runs = [*shown, *([] if trains_end else [(len(ids), num_padded)])]
        start, end = 0, min(first, num_padded)
        while start < num_padded:
            inside = ((max(first, start), min(last, end)) for first, last in runs)
            own = [(first - start, last - start) for first, last in inside if first < last]
            yield _Piece(document[start:end], min(num_counted, end) - start, own)
            start, end = end, min(end + self.seq_len, num_padded)

    def _sequence(self, pieces: Sequence[_Piece]) -> PackedSequence:
        tokens = np.full(self.seq_len, self._eos_id, self._dtype)
        shown: list[Span] = []
        start = 0
        for piece in pieces:
            tokens[start : start + len(piece.tokens)] = piece.tokens
            shown += [(start + first, start + last) for first, last in piece.shown]
            start += len(piece.tokens)
        lengths, counted = ([len(p.tokens) for p in pieces], [p.num_counted for p in pieces])
        if start < self.seq_len:
            lengths, counted = [*lengths, self.seq_len - start], [*counted, 0]
            shown += [(start, self.seq_len)] * self._shows_filling
        # One that is empty where there is none: MDS holds no array without elements.
        runs = np.array(shown or [(0, 0)], np.int32)
        return PackedSequence(tokens, np.array(lengths, np.int32), np.array(counted, np.int32), runs)


class BestFitPacker(Packer):
    """Fills sequences so that no document is cut that fits into one (Ding et al., 2024, arXiv 2404.10830).

    A longer document gives whole sequences, and what is left of it is packed like a document. Documents are packed in
    runs of `RUN_PIECES` or `RUN_TOKENS`, which depend on nothing but their order. In a run the sequences, and what each
    consists of, stand in the order of the documents: the first sequences of many are like the rest.
    """

    def add(
        self,
        ids: Sequence[int] | NDArray[np.unsignedinteger],
        shown: Sequence[Span] = (),
        *,
        trains_end: bool = True,
    ) -> Iterator[PackedSequence]:
        """Append a document as `Packer.add`; where it completes a run, yields its sequences."""
        for piece in self._cut(ids, shown, trains_end, self.seq_len):
            self._pieces.append(piece)
            self.num_pending += len(piece.tokens)
        if len(self._pieces) >= RUN_PIECES or self.num_pending >= RUN_TOKENS:
            yield from self.fill()

    def fill(self) -> Iterator[PackedSequence]:
        """Pack what is pending, and complete sequences as `Packer.fill`."""
        multiple = self._document_multiple
        sizes = [len(piece.tokens) // multiple for piece in self._pieces]
        for items in best_fit(sizes, self.seq_len // multiple):
            yield self._sequence([self._pieces[item] for item in items])
        self._pieces, self.num_pending = [], 0


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Return bins of items by number, both in order: by best-fit decreasing, into bins of `capacity`.

    The largest item that is left goes where the least room remains behind it, and into a new bin where it fits nowhere.
    sizes: from 1 to `capacity`.
    """
    bins: list[list[int]] = []
    bins_by_room: defaultdict[int, list[int]] = defaultdict(list)
    # Bit r: there is a bin with just this room, so that the lowest bit from a size up is the best fit.
    rooms = 0
    for item in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        size = sizes[item]
        if fitting := rooms >> size:
            room = size + (fitting & -fitting).bit_length() - 1
            chosen = bins_by_room[room].pop()
            if not bins_by_room[room]:
                rooms ^= 1 << room
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(item)
        if room > size:
            bins_by_room[room - size].append(chosen)
            rooms |= 1 << (room - size)
    return sorted(map(sorted, bins))


PACKERS: dict[Packing, type[Packer]] = {"concatenate": Packer, "best-fit": BestFitPacker}
