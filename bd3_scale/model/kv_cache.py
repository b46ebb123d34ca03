"""Keys and values of the finished blocks, for generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class KVCache:
    """Preallocated keys and values of every layer, in the order of positions; sequences have lengths of their own.

    A denoising pass writes its blocks' keys behind the finished prefixes and leaves `lengths` alone, so that the next
    pass overwrites them; `commit` makes them part of the prefixes. Nothing is copied when a block attends to prefix and
    itself. A pass may be over the first sequences alone. A cache belongs to the weights that it was made with: after a
    step of training, make another.

    layers: of the model, see `Block.for_decoding`; rotary: the last positions decoded, and their table.

    Shapes: B sequences of a pass, S rows, G key/value heads of this rank, D dimensions a head.
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
        """Put rows behind the prefixes of the first B sequences and return views of prefixes and rows, [B, longest, G,
        D], and how many each sequence sees, int32 [B], or None where all see as many.

        Raises:
            ValueError: the cache is too short for them.
        """
        sequences, rows = key_BSGD.shape[:2]
        lengths = self.lengths[:sequences]
        end = max(lengths) + rows
        if end > self.capacity:
            raise ValueError(
                f"KV cache of {self.capacity} positions cannot hold {end}; build it with capacity >= {end}"
            )
        keys, values = self._keys[layer][:sequences], self._values[layer][:sequences]
        if len(set(lengths)) == 1:
            keys[:, end - rows : end] = key_BSGD
            values[:, end - rows : end] = value_BSGD
            return keys[:, :end], values[:, :end], None
        seen = [length + rows for length in lengths]
        if self._seen is None or self._seen[0] != seen:
            self._seen = seen, torch.tensor(seen, dtype=torch.int32, device=keys.device)
        places = self._seen[1].long()[:, None] + torch.arange(-rows, 0, device=keys.device)
        row = torch.arange(sequences, device=keys.device)[:, None]
        keys[row, places] = key_BSGD
        values[row, places] = value_BSGD
        return keys[:, :end], values[:, :end], self._seen[1]

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of all sequences."""
        return self._keys[layer], self._values[layer]

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
        """Make the first so many of each of the first sequences' last written rows part of its prefix."""
        for sequence, more in enumerate(rows):
            self.lengths[sequence] += more
        assert max(self.lengths) <= self.capacity

    def forget(self, sequence: int, rows: int) -> None:
        """Drop the first so many rows of a sequence's prefix."""
        kept = self.lengths[sequence] - rows
        for tensor in (*self._keys, *self._values):
            tensor[sequence, :kept] = tensor[sequence, rows : rows + kept].clone()
        self.lengths[sequence] = kept

    def add(self) -> None:
        """Begin a sequence behind the others, in a place that `keep` freed."""
        assert len(self.lengths) < len(self._keys[0])
        self.lengths.append(0)

    def keep(self, sequences: Sequence[int]) -> None:
        """Go on with these sequences alone, in ascending order."""
        for place, sequence in enumerate(sequences):
            self._copy(sequence, place)
        self.lengths = [self.lengths[sequence] for sequence in sequences]

    def swap(self, first: int, second: int) -> None:
        """Let two sequences change places."""
        if first == second:
            return
        longest = max(self.lengths[first], self.lengths[second])
        both, turned = [first, second], [second, first]
        for tensor in (*self._keys, *self._values):
            tensor[both, :longest] = tensor[turned, :longest]
        self.lengths[first], self.lengths[second] = self.lengths[second], self.lengths[first]

    def _copy(self, source: int, to: int) -> None:
        if source != to:
            for tensor in (*self._keys, *self._values):
                tensor[to, : self.lengths[source]] = tensor[source, : self.lengths[source]]


class Appending:
    """A cache as n blocks [n, S] of one of its sequences see it: each sees the prefix, the blocks before it and itself.

    The keys that they share are there once.
    """

    def __init__(self, cache: KVCache, sequence: int) -> None:
        self.layers = cache.layers
        self.rotary: tuple[Tensor, Tensor] | None = None
        self._cache, self._sequence = cache, sequence

    def write(self, layer: int, key_BSGD: Tensor, value_BSGD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Put the blocks behind the prefix; returns are those of `KVCache.write`."""
        count, rows = key_BSGD.shape[:2]
        start = self._cache.lengths[self._sequence]
        end = start + count * rows
        found = []
        for new, kept in zip((key_BSGD, value_BSGD), self._cache.of_layer(layer), strict=True):
            mine = kept[self._sequence, :end]
            mine[start:] = new.flatten(0, 1)
            found.append(mine.expand(count, *mine.shape))
        seen = torch.arange(start + rows, end + 1, rows, dtype=torch.int32, device=key_BSGD.device)
        return found[0], found[1], seen
