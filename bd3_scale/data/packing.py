"""Pack documents into sequences of equal length."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Span = tuple[int, int]
Packing = Literal["concatenate", "best-fit"]
# What best-fit packs at once: at most 64 MB of tokens and some hundred bytes for each document.
RUN_PIECES = 1 << 16
RUN_TOKENS = 1 << 24


@dataclass(frozen=True)
class PackedSequence:
    """Token ids [L], and the pieces of documents in the sequence, in order.

    Piece i has `document_lengths[i]` tokens (int32, their sum is L). The first `counted_lengths[i]` of them count for
    perplexity: the text and the first EOS, but not the EOS that pad the document. Independent of the pieces, the tokens
    from `shown[r, 0]` up to `shown[r, 1]` of each run r (int32 [R, 2], in order, R ≥ 1) are shown: never masked,
    trained on or counted.
    """

    tokens: NDArray[np.unsignedinteger]
    document_lengths: NDArray[np.int32]
    counted_lengths: NDArray[np.int32]
    shown: NDArray[np.int32]

    @property
    def num_shown(self) -> int:
        """Return the number of shown tokens."""
        return int((self.shown[:, 1] - self.shown[:, 0]).sum())

    @property
    def num_counted(self) -> int:
        """Return the number of tokens that count for perplexity."""
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
    """A piece of one document: its tokens, how many of them count, and its runs of shown tokens."""

    tokens: NDArray[np.unsignedinteger]
    num_counted: int
    shown: list[Span]


class Packer:
    """Fills sequences of `seq_len` tokens with documents, one after the other and in order.

    Each document ends with EOS and is padded with EOS to a multiple of `document_multiple`. It is cut only at the end
    of a sequence. `seq_len` is a multiple of `document_multiple`, so the length of every piece is one, too. What fills
    a sequence after its last document does not count; with `shows_filling` it is not trained on, either.
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
        # Tokens of documents that are not in a complete sequence yet.
        self.num_pending = 0

    def add(
        self,
        ids: Sequence[int] | NDArray[np.unsignedinteger],
        shown: Sequence[Span] = (),
        *,
        trains_end: bool = True,
    ) -> Iterator[PackedSequence]:
        """Append a document, given without its EOS; yield the sequences that it completes.

        shown: runs of its tokens that are shown, in order. trains_end: train on its EOS and its padding; otherwise
        they are shown, too.
        """
        for piece in self._cut(ids, shown, trains_end, self.seq_len - self.num_pending):
            self._pieces.append(piece)
            self.num_pending += len(piece.tokens)
            if self.num_pending == self.seq_len:
                yield from self.fill()

    def fill(self) -> Iterator[PackedSequence]:
        """Complete the pending sequence, if there is one, with EOS that do not count, and yield it."""
        if self._pieces:
            yield self._sequence(self._pieces)
            self._pieces, self.num_pending = [], 0

    def _cut(
        self, ids: Sequence[int] | NDArray[np.unsignedinteger], shown: Sequence[Span], trains_end: bool, first: int
    ) -> Iterator[_Piece]:
        """Yield a document's pieces: one of `first` tokens, then pieces of `seq_len`, then the rest."""
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
        # An empty run if there is none: MDS cannot store an array without elements.
        runs = np.array(shown or [(0, 0)], np.int32)
        return PackedSequence(tokens, np.array(lengths, np.int32), np.array(counted, np.int32), runs)


class BestFitPacker(Packer):
    """Fills sequences so that no document is cut that fits into one (Ding et al., 2024, arXiv 2404.10830).

    A longer document fills whole sequences, and its rest is packed like a document. Documents are packed in runs of
    `RUN_PIECES` or `RUN_TOKENS`, which depend on the order of the documents alone. Within a run, sequences and the
    pieces in them keep the order of the documents, so that the first sequences of a run are like the rest.
    """

    def add(
        self,
        ids: Sequence[int] | NDArray[np.unsignedinteger],
        shown: Sequence[Span] = (),
        *,
        trains_end: bool = True,
    ) -> Iterator[PackedSequence]:
        """Append a document as `Packer.add`; yield the sequences of a run when it is complete."""
        for piece in self._cut(ids, shown, trains_end, self.seq_len):
            self._pieces.append(piece)
            self.num_pending += len(piece.tokens)
        if len(self._pieces) >= RUN_PIECES or self.num_pending >= RUN_TOKENS:
            yield from self.fill()

    def fill(self) -> Iterator[PackedSequence]:
        """Pack the pending documents, complete their sequences as `Packer.fill`, and yield them."""
        multiple = self._document_multiple
        sizes = [len(piece.tokens) // multiple for piece in self._pieces]
        for items in best_fit(sizes, self.seq_len // multiple):
            yield self._sequence([self._pieces[item] for item in items])
        self._pieces, self.num_pending = [], 0


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items of `sizes` into bins of `capacity` by best-fit decreasing; return the items of each bin, by number.

    The largest remaining item goes into the fullest bin that has room for it, or into a new bin. Bins and items in them
    are sorted. sizes: from 1 to `capacity`.
    """
    bins: list[list[int]] = []
    bins_by_room: defaultdict[int, list[int]] = defaultdict(list)
    # Bit r is set if a bin has exactly r left, so the lowest set bit from `size` up is the best fit, in O(1).
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
