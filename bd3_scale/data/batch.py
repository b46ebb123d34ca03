"""What a model is trained or measured on: sequences with their identity, document bounds and what counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """B sequences of L tokens, on the CPU.

    ids [B] int64: sample numbers in the data set; with `epoch` they key the noise. slots [B] int64: places in the
    global batch, 0 to G−1. tokens [B, L] int64. document_start [B, L] int32: where in the sequence the document of each
    position begins. positions [B, L] int64: from 0 in every document. counted [B, L] bool: counts for perplexity.
    shown [B, L] bool: never masked, trained on or counted, as what a document begins with, or a person's part of a
    conversation.
    """

    ids: Tensor
    slots: Tensor
    epoch: int
    tokens: Tensor
    document_start: Tensor
    positions: Tensor
    counted: Tensor
    shown: Tensor

    def __getstate__(self) -> dict[str, Any]:
        # Arrays are sent as bytes; tensors would lie in /dev/shm, which may be small.
        return {name: value.numpy() if isinstance(value, Tensor) else value for name, value in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(
            {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in state.items()}
        )

    @property
    def padding(self) -> Tensor:
        """bool [B, L]: pads a document behind its end."""
        return ~self.counted & ~self.shown

    def take(self, rows: Tensor) -> Batch:
        """The sequences at `rows`, int64."""
        tensors: dict[str, Any] = {key: value[rows] for key, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)

    def split(self, micro_batch_size: int) -> list[Batch]:
        """Consecutive batches of `micro_batch_size` sequences; the last may have fewer."""
        per_sequence = (self.ids, self.slots, self.tokens, self.document_start, self.positions, self.counted)
        parts = zip(*(tensor.split(micro_batch_size) for tensor in (*per_sequence, self.shown)), strict=True)
        return [Batch(ids, slots, self.epoch, *rest) for ids, slots, *rest in parts]


def collate(
    samples: Sequence[dict[str, NDArray[Any]]],
    ids: NDArray[np.int64],
    slots: NDArray[np.int64],
    epoch: int,
    isolate_documents: bool,
) -> Batch:
    """The batch of `samples` as the shards hold them. Without `isolate_documents` a sequence is one document."""
    tokens = np.stack([sample["tokens"] for sample in samples]).astype(np.int64)
    within = np.arange(tokens.shape[1])
    start = np.stack([_per_position(_starts(sample), sample) for sample in samples])
    counted_end = np.stack([_per_position(_starts(sample) + sample["counted_lengths"], sample) for sample in samples])
    document_start = start if isolate_documents else np.zeros_like(start)
    shown = np.stack([_shown(sample, tokens.shape[1]) for sample in samples])
    return Batch(
        ids=torch.from_numpy(ids),
        slots=torch.from_numpy(slots),
        epoch=epoch,
        tokens=torch.from_numpy(tokens),
        document_start=torch.from_numpy(document_start.astype(np.int32)),
        positions=torch.from_numpy(within - document_start),
        counted=torch.from_numpy((within < counted_end) & ~shown),
        shown=torch.from_numpy(shown),
    )


def _shown(sample: dict[str, NDArray[Any]], seq_len: int) -> NDArray[np.bool_]:
    """bool [L]; nothing in shards without the column, as those of before it and of plain text without BOS."""
    shown = np.zeros(seq_len, np.bool_)
    for first, last in sample.get("shown", ()):
        shown[first:last] = True
    return shown


def _starts(sample: dict[str, NDArray[Any]]) -> NDArray[np.int64]:
    lengths = sample["document_lengths"].astype(np.int64)
    return np.cumsum(lengths) - lengths


def _per_position(per_piece: NDArray[np.int64], sample: dict[str, NDArray[Any]]) -> NDArray[np.int64]:
    return np.repeat(per_piece, sample["document_lengths"])
