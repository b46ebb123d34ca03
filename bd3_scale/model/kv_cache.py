"""Keys and values of the finished blocks, for generation."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Preallocated keys and values of every layer, in the order of positions.

    A denoising pass writes its block's keys behind the finished prefix and leaves `length` alone, so that the next pass
    overwrites them; `commit` makes them part of the prefix. Nothing is copied when a block attends to prefix and
    itself.

    Shapes: B sequences, G key/value heads of this rank, D dimensions a head.
    """

    def __init__(
        self, num_layers: int, shape_BSGD: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ):
        self.capacity = shape_BSGD[1]
        self.length = 0
        self._keys = [torch.empty(shape_BSGD, dtype=dtype, device=device) for _ in range(num_layers)]
        self._values = [torch.empty(shape_BSGD, dtype=dtype, device=device) for _ in range(num_layers)]

    def write(self, layer: int, key_BSGD: Tensor, value_BSGD: Tensor) -> tuple[Tensor, Tensor]:
        """Put rows behind the prefix and return views of prefix and rows, [B, length + S, G, D].

        Raises:
            ValueError: the cache is too short for them.
        """
        end = self.length + key_BSGD.shape[1]
        if end > self.capacity:
            raise ValueError(
                f"KV cache of {self.capacity} positions cannot hold {end}; build it with capacity >= {end}"
            )
        self._keys[layer][:, self.length : end] = key_BSGD
        self._values[layer][:, self.length : end] = value_BSGD
        return self._keys[layer][:, :end], self._values[layer][:, :end]

    def commit(self, rows: int) -> None:
        """Make the last written rows part of the prefix."""
        self.length += rows
        assert self.length <= self.capacity
