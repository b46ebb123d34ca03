"""What a model is trained or measured on: sequences with their identity, document bounds and what counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """B sequences of L tokens, on the CPU.

    ids [B] int64: sample numbers in the data set; with epochs [B] int64, which of its epochs each is of, and
    source_keys [B] int64, 0 where the data set has no name, they key the noise. slots [B] int64: places in the global
    batch, 0 to G−1. tokens [B, L] int64. document_start [B, L] int32: where in the sequence the document of each
    position begins. positions [B, L] int64: from 0 in every document. counted [B, L] bool: counts for perplexity.
    shown [B, L] bool: never masked, trained on or counted, as what a document begins with, or a person's part of a
    conversation.
    """

    ids: Tensor
    slots: Tensor
    epochs: Tensor
    source_keys: Tensor
    tokens: Tensor
    document_start: Tensor
    positions: Tensor
    counted: Tensor
    shown: Tensor

    def __getstate__(self) -> dict[str, Any]:
        # Arrays are sent as bytes; tensors would lie in /dev/shm, which may be small.
        return {name: value.numpy() for name, value in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({name: torch.from_numpy(value) for name, value in state.items()})

    def to_bytes(self) -> NDArray[np.uint8]:
        """Return all of it as bytes, uint8 [N]: 32 a sequence and 22 a token."""
        whole = np.empty(1, _layout(*self.tokens.shape))
        for name, value in vars(self).items():
            whole[name] = value.numpy()
        return whole.view(np.uint8)

    @classmethod
    def from_bytes(cls, content: NDArray[np.uint8], sequences: int, seq_len: int) -> Batch:
        """Return what `to_bytes` has made of a batch of that shape. ValueError: `content` has not that many bytes."""
        (whole,) = content.view(_layout(sequences, seq_len))
        return cls(**{name: torch.from_numpy(whole[name].copy()) for name in whole.dtype.names})

    @property
    def padding(self) -> Tensor:
        """Return bool [B, L]: pads a document behind its end."""
        return ~self.counted & ~self.shown

    def take(self, rows: Tensor) -> Batch:
        """Return the sequences at `rows`, int64."""
        return Batch(**{key: value[rows] for key, value in vars(self).items()})

    def split(self, micro_batch_size: int) -> list[Batch]:
        """Return consecutive batches of `micro_batch_size` sequences; the last may have fewer."""
        parts = zip(*(tensor.split(micro_batch_size) for tensor in vars(self).values()), strict=True)
        return [Batch(*part) for part in parts]

    @property
    def noise_keys(self) -> dict[str, Tensor]:
        """Return what the noise of each sequence is drawn from beside the seed, see `bd3_scale.diffusion.noise`."""
        return {"sample_ids": self.ids, "epoch": self.epochs, "source_keys": self.source_keys}


def _layout(sequences: int, seq_len: int) -> np.dtype[Any]:
    of_sequence = ("ids", "slots", "epochs", "source_keys")
    of_token = {
        "tokens": np.int64,
        "document_start": np.int32,
        "positions": np.int64,
        "counted": np.bool_,
        "shown": np.bool_,
    }
    fields = [(name, np.int64, (sequences,)) for name in of_sequence]
    return np.dtype([*fields, *((name, kind, (sequences, seq_len)) for name, kind in of_token.items())])


def collate(
    samples: Sequence[dict[str, NDArray[Any]]],
    ids: NDArray[np.int64],
    slots: NDArray[np.int64],
    isolate_documents: bool,
    *,
    epochs: NDArray[np.int64] | None = None,
    source_keys: NDArray[np.int64] | None = None,
) -> Batch:
    """The batch of `samples` as the shards hold them. Without `isolate_documents` a sequence is one document. The
    default of what keys the noise is 0.
    """
    tokens = np.stack([sample["tokens"] for sample in samples]).astype(np.int64)
    within = np.arange(tokens.shape[1])
    start = np.stack([_per_position(_starts(sample), sample) for sample in samples])
    counted_end = np.stack([_per_position(_starts(sample) + sample["counted_lengths"], sample) for sample in samples])
    document_start = start if isolate_documents else np.zeros_like(start)
    shown = np.stack([_shown(sample, tokens.shape[1]) for sample in samples])
    return Batch(
        ids=torch.from_numpy(ids),
        slots=torch.from_numpy(slots),
        epochs=torch.from_numpy(np.zeros_like(ids) if epochs is None else epochs),
        source_keys=torch.from_numpy(np.zeros_like(ids) if source_keys is None else source_keys),
        tokens=torch.from_numpy(tokens),
        document_start=torch.from_numpy(document_start.astype(np.int32)),
        positions=torch.from_numpy(within - document_start),
        counted=torch.from_numpy((within < counted_end) & ~shown),
        shown=torch.from_numpy(shown),
    )


def _shown(sample: dict[str, NDArray[Any]], seq_len: int) -> NDArray[np.bool_]:
    """Return bool [L]; nothing in shards without the column, as those of before it and of plain text without BOS."""
    shown = np.zeros(seq_len, np.bool_)
    for first, last in sample.get("shown", ()):
        shown[first:last] = True
    return shown


def _starts(sample: dict[str, NDArray[Any]]) -> NDArray[np.int64]:
    lengths = sample["document_lengths"].astype(np.int64)
    return np.cumsum(lengths) - lengths


def _per_position(per_piece: NDArray[np.int64], sample: dict[str, NDArray[Any]]) -> NDArray[np.int64]:
    return np.repeat(per_piece, sample["document_lengths"])
