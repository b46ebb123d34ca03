"""Keep the keys and values of finished blocks, for generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class KVCache:
    """Preallocated keys and values of every layer, in the order of positions; each sequence has its own length.

    A denoising pass writes its blocks' keys behind the finished prefixes and leaves `lengths` unchanged, so that the
    next pass overwrites them. `commit` makes them part of the prefixes: only then is the block final (block diffusion
    caches finished blocks; the keys of a block change with every denoising pass). Prefix and block are one view, so
    attention copies nothing. A pass may cover only the first sequences.

    A cache is valid for the weights it was made with: after a training step, make a new one.

    layers: the layers of the model as functions, see `Block.for_decoding`; rotary: the positions decoded last, and
    their table.

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
        """Write rows behind the prefixes of the first B sequences.

        Returns views of prefixes and rows, keys and values [B, longest, G, D], and how many of them each sequence sees,
        int32 [B], or None where all see equally many.

        Raises:
            ValueError: the cache is too short for them.
        """
        sequences, rows = key_BSGD.shape[:2]
        lengths = self.lengths[:sequences]
        end = max(lengths) + rows
        if end > self.capacity:
            raise ValueError(
                f"the KV cache has {self.capacity} positions and cannot hold {end}: make it with capacity >= {end}"
            )
        keys, values = self._keys[layer][:sequences], self._values[layer][:sequences]
        if len(set(lengths)) == 1:
            keys[:, end - rows : end] = key_BSGD
            values[:, end - rows : end] = value_BSGD
            return keys[:, :end], values[:, :end], None
        seen = [length + rows for length in lengths]
        if self._seen is None or self._seen[0] != seen:
            self._seen = seen, torch.tensor(seen, dtype=torch.int32, device=keys.device)
        positions = self._seen[1].long()[:, None] + torch.arange(-rows, 0, device=keys.device)
        row = torch.arange(sequences, device=keys.device)[:, None]
        keys[row, positions] = key_BSGD
        values[row, positions] = value_BSGD
        return keys[:, :end], values[:, :end], self._seen[1]

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a layer, of all sequences."""
        return self._keys[layer], self._values[layer]

    def positions(self, starts: Sequence[int], size: int) -> Tensor:
        """Return int64 [B, size], the positions from each sequence's start on.

        All passes of a block get the same tensor object, by which the model recognises that the rotary table is valid.
        """
        key = (tuple(starts), size)
        if self._positions is None or self._positions[0] != key:
            device = self._keys[0].device
            self._positions = key, (torch.tensor(starts)[:, None] + torch.arange(size)).to(device)
        return self._positions[1]

    def commit(self, rows: Sequence[int]) -> None:
        """Add the first rows[i] of the rows written last to the prefix of sequence i."""
        for sequence, more in enumerate(rows):
            self.lengths[sequence] += more
        assert max(self.lengths) <= self.capacity

    def forget(self, sequence: int, rows: int) -> None:
        """Drop the first `rows` rows of a sequence's prefix."""
        kept = self.lengths[sequence] - rows
        for tensor in (*self._keys, *self._values):
            tensor[sequence, :kept] = tensor[sequence, rows : rows + kept].clone()
        self.lengths[sequence] = kept

    def add(self) -> None:
        """Add an empty sequence behind the others, in memory that `keep` freed."""
        assert len(self.lengths) < len(self._keys[0])
        self.lengths.append(0)

    def keep(self, sequences: Sequence[int]) -> None:
        """Keep only these sequences, given in ascending order."""
        for target, sequence in enumerate(sequences):
            self._copy(sequence, target)
        self.lengths = [self.lengths[sequence] for sequence in sequences]

    def swap(self, first: int, second: int) -> None:
        """Exchange the positions of two sequences in the batch."""
        if first == second:
            return
        longest = max(self.lengths[first], self.lengths[second])
        pair, swapped = [first, second], [second, first]
        for tensor in (*self._keys, *self._values):
            tensor[pair, :longest] = tensor[swapped, :longest]
        self.lengths[first], self.lengths[second] = self.lengths[second], self.lengths[first]

    def _copy(self, source: int, to: int) -> None:
        if source != to:
            for tensor in (*self._keys, *self._values):
                tensor[to, : self.lengths[source]] = tensor[source, : self.lengths[source]]


class Appending:
    """A view of a cache for n blocks [n, S] of one sequence, as a batch of n.

    Each block sees the prefix, the blocks before it and itself. The batch's keys are one expanded tensor, so the keys
    that blocks share are in memory once.
    """

    def __init__(self, cache: KVCache, sequence: int) -> None:
        self.layers = cache.layers
        self.rotary: tuple[Tensor, Tensor] | None = None
        self._cache, self._sequence = cache, sequence

    def write(self, layer: int, key_BSGD: Tensor, value_BSGD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Write the blocks behind the prefix; returns what `KVCache.write` does."""
        count, rows = key_BSGD.shape[:2]
        start = self._cache.lengths[self._sequence]
        end = start + count * rows
        views = []
        for new, kept in zip((key_BSGD, value_BSGD), self._cache.of_layer(layer), strict=True):
            of_sequence = kept[self._sequence, :end]
            of_sequence[start:] = new.flatten(0, 1)
            views.append(of_sequence.expand(count, *of_sequence.shape))
        seen = torch.arange(start + rows, end + 1, rows, dtype=torch.int32, device=key_BSGD.device)
        return views[0], views[1], seen
