"""Keys and values of the finished blocks, for generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class KVCache:
    """Preallocated keys and values of every layer, in the order of positions; sequences have lengths of their own.

    A denoising pass writes its blocks' keys behind the finished prefixes and leaves `lengths` alone, so that the next
    pass overwrites them; `commit` makes them part of the prefixes. Nothing is copied when a block attends to prefix and
    itself. It belongs to the weights that it was made with: after a step of training, make another.

    layers: of the model, see `Block.for_decoding`; rotary: the last positions decoded, and their table.

    Shapes: B sequences, S rows, G key/value heads of this rank, D dimensions a head.
    """

    def __init__(
        self,
        layers: Sequence[Callable[..., Tensor]],
        shape_BSGD: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layers = layers
        self.rotary: tuple[Tensor, Tensor] | None = None
        self.capacity = shape_BSGD[1]
        self.lengths = [0] * shape_BSGD[0]
        self._keys = [torch.empty(shape_BSGD, dtype=dtype, device=device) for _ in layers]
        self._values = [torch.empty(shape_BSGD, dtype=dtype, device=device) for _ in layers]
        self._seen: tuple[list[int], Tensor] | None = None
        self._positions: tuple[tuple[tuple[int, ...], int], Tensor] | None = None

    def write(self, layer: int, key_BSGD: Tensor, value_BSGD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Put rows behind the prefixes and return views of prefixes and rows, [B, longest, G, D], and how many each
        sequence sees, int32 [B], or None where all see as many.

        Raises:
            ValueError: the cache is too short for them.
        """
        rows = key_BSGD.shape[1]
        end = max(self.lengths) + rows
        if end > self.capacity:
            raise ValueError(
                f"KV cache of {self.capacity} positions cannot hold {end}; build it with capacity >= {end}"
            )
        keys, values = self._keys[layer], self._values[layer]
        if len(set(self.lengths)) == 1:
            keys[:, end - rows : end] = key_BSGD
            values[:, end - rows : end] = value_BSGD
            return keys[:, :end], values[:, :end], None
        if self._seen is None or self._seen[0] != [length + rows for length in self.lengths]:
            seen = [length + rows for length in self.lengths]
            self._seen = seen, torch.tensor(seen, dtype=torch.int32, device=keys.device)
        places = self._seen[1].long()[:, None] + torch.arange(-rows, 0, device=keys.device)
        sequences = torch.arange(len(places), device=keys.device)[:, None]
        keys[sequences, places] = key_BSGD
        values[sequences, places] = value_BSGD
        return keys[:, :end], values[:, :end], self._seen[1]

    def positions(self, starts: Sequence[int], size: int) -> Tensor:
        """Return int64 [B, size], the positions from each sequence's start on: one tensor for all passes of a block, so
        that they share its rotary table.
        """
        asked = (tuple(starts), size)
        if self._positions is None or self._positions[0] != asked:
            device = self._keys[0].device
            self._positions = asked, (torch.tensor(starts)[:, None] + torch.arange(size)).to(device)
        return self._positions[1]

    def commit(self, rows: Sequence[int]) -> None:
        """Make the first so many of each sequence's last written rows part of its prefix."""
        self.lengths = [length + more for length, more in zip(self.lengths, rows, strict=True)]
        assert max(self.lengths) <= self.capacity

    def forget(self, sequence: int, rows: int) -> None:
        """Drop the first so many rows of a sequence's prefix."""
        kept = self.lengths[sequence] - rows
        for tensor in (*self._keys, *self._values):
            tensor[sequence, :kept] = tensor[sequence, rows : rows + kept].clone()
        self.lengths[sequence] = kept

    def keep(self, sequences: Sequence[int]) -> None:
        """Go on with these sequences alone."""
        index = torch.tensor(sequences, device=self._keys[0].device)
        self._keys = [keys[index] for keys in self._keys]
        self._values = [values[index] for values in self._values]
        self.lengths = [self.lengths[sequence] for sequence in sequences]
