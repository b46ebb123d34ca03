"""Define the inputs of the model on a rank: the rows of its positions, and which of them the head reads.

The two-stream forward has a row for every token of every noisy copy, and one for every clean token (BD3-LM: Arriola et
al., ICLR 2025, section 3.2).

Legend: B sequences, L data tokens a sequence, R positions of this context-parallel rank (L without), C noisy copies,
S streams (the noisy copies, then the clean tokens where there is such a stream), M rows of the head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bd3_scale.model.attend import Attend

# Maps the nll of the targets [M] and the log-sum-exp of all logits [M] to losses [M].
RowLoss = Callable[[Tensor, Tensor], Tensor]
# Noise on a mask embedding is one of this many fixed vectors; the first is zero, for rows without noise. A vector of
# its own for every row would make the host draw hidden_size numbers a row at every step.
NOISE_ROWS = 4096


@dataclass(frozen=True)
class Placement:
    """The place of a rank in the layout.

    Attributes:
        device: the device of its tensors.
        context: its number among the context-parallel ranks, which split the positions of a sequence, and their number.
    """

    device: torch.device
    context: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class MaskNoise:
    """Gaussian noise that is added to the embeddings of masked tokens.

    Attributes:
        rows: int64 [B, C·R] in [1, NOISE_ROWS), the number of the noise vector of each noisy row.
        std: the standard deviation of the noise.
    """

    rows: Tensor
    std: float

    def to(self, device: torch.device) -> MaskNoise:
        """Return the noise on `device`; see `ModelInputs.to`."""
        return MaskNoise(to_device(self.rows, device), self.std)


@dataclass(frozen=True)
class ModelInputs:
    """A micro-batch as the model takes it; the same for every pipeline stage and tensor-parallel rank.

    Attributes:
        tokens: int64 [B, S·R], one stream after the other.
        positions: int64 [B, R], within the document.
        spans: int32 [3, B, L], or [5, B, R] of a context-parallel rank; see `bd3_scale.attention.spans`.
        num_noisy: C; 0 for clean rows alone.
        head_rows: int64 [M], indices of the rows that the head reads, into [streams that the head reads · R, B].
        targets: int64 [M], the tokens to predict there.
        weights: float32 [M], the factors of the rows' losses.
        row_loss: the loss of a row of the head; None: the negative log-likelihood of its target.
        noisy_pairs, clean_pairs: numbers of query-key pairs that the mask allows, of noisy and of clean queries, for
            one head.
        trained_tokens: for each sequence, the number of tokens at this rank's positions that are not shown.
        mask_noise: noise to add to the embeddings of masked tokens.
        loss_groups: the number of each sequence's group, on the host; the loss is also reported by group, which is a
            pair of block size and data source. None: all are in group 0.
        row_loss_groups: int64 [M], the group of the sequence of each row of the head.
    """

    tokens: Tensor
    positions: Tensor
    spans: Tensor
    num_noisy: int
    head_rows: Tensor
    targets: Tensor
    weights: Tensor
    noisy_pairs: int
    clean_pairs: int
    trained_tokens: tuple[int, ...] = ()
    mask_noise: MaskNoise | None = None
    loss_groups: tuple[int, ...] | None = None
    row_loss_groups: Tensor | None = None
    row_loss: RowLoss | None = None

    @property
    def num_streams(self) -> int:
        return self.tokens.shape[1] // self.positions.shape[1]

    def to(self, device: torch.device) -> ModelInputs:
        """Return the inputs on `device`; the host does not wait for the copy to a GPU."""
        moved: dict[str, Any] = {
            name: to_device(value, device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved, mask_noise=self.mask_noise and self.mask_noise.to(device))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on `device`; the host does not wait for the copy to a GPU."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        # From pageable memory the copy would block the host until all earlier work of the device is done, in spite of
        # `non_blocking` (CUDA runtime API, "API synchronization behavior").
        tensor = torch.empty_like(tensor, pin_memory=True).copy_(tensor)
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class RowContext:
    """Facts that a layer needs about the rows that pass through it.

    Attributes:
        rotary: cos and sin of each row, see `rotary_table`.
        attend: attention to the keys that the rows see.
        num_streams, num_noisy: S and C; in decoding there is one stream.
        wanted: bool, the rows [B, L] of a block whose output is needed; None: all.
    """

    rotary: Tensor
    attend: Attend
    num_streams: int = 1
    num_noisy: int = 0
    wanted: Tensor | None = None

    @property
    def kept_streams(self) -> int:
        """Return the number of streams with an output in the last layer, where clean rows serve as keys alone."""
        return self.num_noisy or self.num_streams

    def kept(self, x: Tensor) -> slice | Tensor | None:
        """Return an index of the rows of x that have an output in the last layer.

        These are the noisy rows, which come first, or the wanted rows of a block; None: all rows.
        """
        if self.num_noisy:
            return slice(0, len(x) // self.num_streams * self.num_noisy)
        return self.wanted
