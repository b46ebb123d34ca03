"""What a rank computes on: the rows of its positions, noisy copies and clean tokens, and which of them the head reads.

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

# From the nll of the targets [M] and the logarithm of the sum of the exponentials of all logits [M] to a loss [M].
RowLoss = Callable[[Tensor, Tensor], Tensor]
# Noise on mask embeddings is one of so many vectors; the first is zero, for rows that have none.
NOISE_ROWS = 4096


@dataclass(frozen=True)
class Placement:
    """The place where a rank computes.

    Attributes:
        device: of its tensors.
        context: its number, and how many there are, among the ranks that split the positions of a sequence.
    """

    device: torch.device
    context: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class MaskNoise:
    """Gaussian noise that is added to the embeddings of masked tokens.

    Attributes:
        rows: int64 [B, C·R] in [1, NOISE_ROWS), which of the noise vectors each noisy row takes.
        std: its standard deviation.
    """

    rows: Tensor
    std: float

    def to(self, device: torch.device) -> MaskNoise:
        """Return the same on `device`, as `ModelInputs.to`."""
        return MaskNoise(to_device(self.rows, device), self.std)


@dataclass(frozen=True)
class ModelInputs:
    """A micro-batch as the model takes it, the same for every pipeline stage and tensor-parallel rank.

    Attributes:
        tokens: int64 [B, S·R], one stream after the other.
        positions: int64 [B, R], within the document.
        spans: int32 [3, B, L], or [5, B, R] of a context-parallel rank; see `bd3_scale.attention.spans`.
        num_noisy: C; 0 for clean rows alone.
        head_rows: int64 [M], as indices into [streams that the head reads · R, B]; the head sees no others.
        targets: int64 [M], the tokens to predict there.
        weights: float32 [M], what multiplies the loss of each.
        row_loss: what a row of the head loses; None: the negative log-likelihood of its target.
        noisy_pairs, clean_pairs: query-key pairs that the mask lets through, by kind of query, for one head.
        trained_tokens: of each sequence, on this rank's positions, how many are not shown.
        mask_noise: what is added to the embeddings of masked tokens.
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
        """Return the same on `device`; the host does not wait for a GPU to receive it."""
        moved: dict[str, Any] = {
            name: to_device(value, device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved, mask_noise=self.mask_noise and self.mask_noise.to(device))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on `device`; the host does not wait for a GPU to receive it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        # From pages that can be moved, a copy would block the host until all work before it on the device is done.
        tensor = torch.empty_like(tensor, pin_memory=True).copy_(tensor)
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class RowContext:
    """The rows that pass through a layer, as far as it must know them.

    Attributes:
        rotary: cos and sin for each of them, see `rotary_table`.
        attend: attention over the keys that they see.
        num_streams, num_noisy: S and C; rows that are decoded are one stream.
        wanted: of the rows [B, L] of a block, those whose output is wanted, bool; None: all.
    """

    rotary: Tensor
    attend: Attend
    num_streams: int = 1
    num_noisy: int = 0
    wanted: Tensor | None = None

    @property
    def kept_streams(self) -> int:
        """Return of how many streams the last layer makes an output: clean rows serve as keys alone there."""
        return self.num_noisy or self.num_streams

    def kept(self, x: Tensor) -> slice | Tensor | None:
        """Return an index of those rows of x whose output the last layer makes: the first ones, where clean rows serve
        as keys alone, or the wanted ones; None: all.
        """
        if self.num_noisy:
            return slice(0, len(x) // self.num_streams * self.num_noisy)
        return self.wanted
