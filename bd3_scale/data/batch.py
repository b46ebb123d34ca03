"""A batch of packed sequences on the host."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Sequences of one data-parallel rank, as CPU tensors.

    Attributes:
        epoch: pass over the data, from 0.
        ids: int64 [B], each sequence's index in its split.
        slots: int64 [B], its place in the global batch.
        tokens: int64 [B, L].
        document_start: int32 [B, L], where the document of each position starts in the sequence.
        positions: int64 [B, L], position within the document.
        counted: bool [B, L], the tokens that perplexity counts.
    """

    epoch: int
    ids: Tensor
    slots: Tensor
    tokens: Tensor
    document_start: Tensor
    positions: Tensor
    counted: Tensor

    def split(self, size: int) -> list[Batch]:
        """Micro-batches of `size` sequences, in order."""
        tensors = (self.ids, self.slots, self.tokens, self.document_start, self.positions, self.counted)
        return [Batch(self.epoch, *parts) for parts in zip(*(t.split(size) for t in tensors), strict=True)]
