"""Define the batch that a model is trained or evaluated on: sequences, their ids and the bounds of their documents."""

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

    ids [B] int64: sample numbers within the data set. The noise of a sequence is keyed by ids, epochs [B] int64 (the
    epoch of the data set that the sample belongs to) and source_keys [B] int64 (0 for data without a source name).
    slots [B] int64: positions in the global batch, 0 to G−1. tokens [B, L] int64. document_start [B, L] int32: the
    position at which the document of each position begins. positions [B, L] int64: from 0 in every document. counted
    [B, L] bool: counts for perplexity. shown [B, L] bool: never masked, trained on or counted, such as BOS or a
    user's messages in a conversation.
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
        # Arrays are pickled as bytes. Tensors would be sent through /dev/shm, which is small in many containers.
        return {name: value.numpy() for name, value in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({name: torch.from_numpy(value) for name, value in state.items()})

    def to_bytes(self) -> NDArray[np.uint8]:
        """Return the batch as bytes, uint8 [N]: 32 for each sequence and 22 for each token."""
        whole = np.empty(1, _layout(*self.tokens.shape))
        for name, value in vars(self).items():
            whole[name] = value.numpy()
        return whole.view(np.uint8)

    @classmethod
    def from_bytes(cls, content: NDArray[np.uint8], sequences: int, seq_len: int) -> Batch:
        """Return the batch from the bytes of `to_bytes` and its shape. ValueError: `content` has another size."""
        (whole,) = content.view(_layout(sequences, seq_len))
        return cls(**{name: torch.from_numpy(whole[name].copy()) for name in whole.dtype.names})

    @property
    def padding(self) -> Tensor:
        """Return bool [B, L]: EOS tokens that pad a document after its end."""
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
        """Return what the noise of each sequence is keyed by, besides the seed; see `bd3_scale.diffusion.noise`."""
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
    """Return the batch of `samples`, as shards hold them.

    Without `isolate_documents` each sequence is one document. `epochs` and `source_keys` default to 0.
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
    """Return bool [L]; all False for shards without the column: older ones, and plain text without BOS."""
    shown = np.zeros(seq_len, np.bool_)
    for first, last in sample.get("shown", ()):
        shown[first:last] = True
    return shown


def _starts(sample: dict[str, NDArray[Any]]) -> NDArray[np.int64]:
    lengths = sample["document_lengths"].astype(np.int64)
    return np.cumsum(lengths) - lengths


def _per_position(per_piece: NDArray[np.int64], sample: dict[str, NDArray[Any]]) -> NDArray[np.int64]:
    return np.repeat(per_piece, sample["document_lengths"])
