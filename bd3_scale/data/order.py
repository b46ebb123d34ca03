"""Compute the position of each training sequence, as a pure function of the seed: nothing is stored for a resume.

A global batch of G slots is divided among C = min(64, G) canonical nodes, whatever machines there are. Node c has the
slots ⌊cG/C⌋ to ⌊(c+1)G/C⌋ − 1 of every batch. Of the N samples it has those from ⌊N·lo/G⌋ to ⌊N·hi/G⌋ − 1, where its
slots are lo to hi − 1. That is at least ⌊N/G⌋ samples a slot, which is the number of batches of an epoch. A machine
reads only the samples of its canonical nodes, so up to 64 machines need not read the same shards.

In every epoch, a node puts its shards (at the ends of its range, pieces of shards) in random order, and starts at a
random sample of that row. Then it shuffles the samples within windows of W/C, where W is `data.shuffle_window`. So a
sample is equally likely at each place of its node, and a node reads the shards of only one window at a time.

A permutation is the stable order of raw bits of Philox4x64-10, as `numpy.random.Philox` computes them. numpy
guarantees these bits; its shuffling functions may change between versions.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from bd3_scale.recipe.section import PositiveInt, Section

CANONICAL_NODES = 64
Ints = NDArray[np.int64]


class DataOrder(Section):
    """The order of a run's data. Checkpoints store it, and the run keeps it, whatever later versions use.

    Attributes:
        version: 1 is the order of `bd3_scale.data.earlier_order`, 2 that of this module.
        shuffle_window: W, in sequences; None in version 1, which has no window.
    """

    version: Literal[1, 2] = 2
    shuffle_window: PositiveInt | None = None


EARLIER = DataOrder(version=1)


class Sequences(NamedTuple):
    """The sequences in some slots of a global batch, each int64 [B]: source number, epoch of the source, sample id."""

    sources: Ints
    epochs: Ints
    ids: Ints

    @classmethod
    def of_one(cls, epoch: int, ids: Ints) -> Sequences:
        """Return the sequences of a single data set."""
        return cls(np.zeros_like(ids), np.full_like(ids, epoch), ids)


class Order(Protocol):
    """The sequences of some slots of every global batch."""

    def at(self, step: int) -> Sequences:
        """Return the sequences of the batch that follows `step` finished steps."""
        ...


class InOrder:
    """Samples in the order of the shards, without shuffling, epoch after epoch."""

    def __init__(self, num_samples: int, global_batch_size: int, slots: Ints) -> None:
        self.steps_per_epoch = num_samples // global_batch_size
        self._global_batch_size, self._slots = global_batch_size, slots

    def at(self, step: int) -> Sequences:
        """Return the sequences of the batch that follows `step` finished steps."""
        epoch, first = divmod(step, self.steps_per_epoch)
        return Sequences.of_one(epoch, first * self._global_batch_size + self._slots)


class WindowOrder:
    """Order 2 of the slots `slots`, int64 [B], ascending; see the module. It caches a window of each of their nodes."""

    def __init__(
        self, samples_per_shard: Ints, global_batch_size: int, slots: Ints, *, shuffle_window: int, seed: int
    ) -> None:
        shard_ends = np.cumsum(samples_per_shard)
        self.steps_per_epoch = int(shard_ends[-1]) // global_batch_size
        bounds = node_slots(global_batch_size)
        self._nodes = []
        for node, rows in nodes_of(slots, global_batch_size):
            order = NodeOrder(shard_ends, global_batch_size, node, shuffle_window=shuffle_window, seed=seed)
            self._nodes.append((order, bounds[node + 1] - bounds[node], slots[rows] - bounds[node]))

    def at(self, step: int) -> Sequences:
        """Return the sequences of the batch that follows `step` finished steps."""
        epoch, first = divmod(step, self.steps_per_epoch)
        ids = [order.ids(epoch, first * count + own) for order, count, own in self._nodes]
        return Sequences.of_one(epoch, np.concatenate(ids))


class NodeOrder:
    """The order of one canonical node's samples; one window is cached. shuffle_window: None: no shuffling."""

    def __init__(
        self, shard_ends: Ints, global_batch_size: int, node: int, *, shuffle_window: int | None, seed: int
    ) -> None:
        bounds = node_slots(global_batch_size)[node : node + 2].tolist()
        first, last = (bound * int(shard_ends[-1]) // global_batch_size for bound in bounds)
        # The range may begin and end within shards: the first and the last piece are parts of shards.
        cut_from, cut_to = np.searchsorted(shard_ends, first, "right"), np.searchsorted(shard_ends, last, "left")
        starts = np.concatenate([[first], shard_ends[cut_from:cut_to]])
        lengths = np.diff(starts, append=last)
        self._starts, self._lengths = starts[lengths > 0], lengths[lengths > 0]
        self.num_samples = last - first
        self._window_size = window_of_node(shuffle_window, global_batch_size) if shuffle_window is not None else 0
        self._node, self._seed = node, seed
        self._row: tuple[int, Ints, Ints, int] | None = None
        self._window: tuple[int, int, Ints] | None = None

    def ids(self, epoch: int, places: Ints) -> Ints:
        """Return the samples at `places`, int64 [B], ascending, below `num_samples`, in an epoch."""
        if not self._window_size:
            return self._starts[0] + places
        windows, within = np.divmod(places, self._window_size)
        parts = [self._samples(epoch, int(window))[within[windows == window]] for window in np.unique(windows)]
        return np.concatenate(parts) if parts else places

    def _samples(self, epoch: int, window: int) -> Ints:
        if self._window is None or self._window[:2] != (epoch, window):
            before = self.before_shuffle(epoch, window)
            random = _bits(len(before), self._seed, epoch, self._node, window, _Purpose.SAMPLES)
            self._window = epoch, window, before[ranked(random)]
        return self._window[2]

    def before_shuffle(self, epoch: int, window: int) -> Ints:
        """Return the samples of a window before its shuffle, shard by shard; the last window may be shorter."""
        if self._row is None or self._row[0] != epoch:
            self._row = epoch, *self._shuffled_shards(epoch)
        _, ends, offsets, begin = self._row
        first = window * self._window_size
        places = np.arange(first, min(first + self._window_size, self.num_samples))
        places = (places + begin) % self.num_samples
        return places + offsets[np.searchsorted(ends, places, side="right")]

    def _shuffled_shards(self, epoch: int) -> tuple[Ints, Ints, int]:
        """Return the node's shards in this epoch's order: the end of each, the difference between its sample ids and
        their places, and the place of the first sample.
        """
        random = _bits(len(self._starts), self._seed, epoch, self._node, 0, _Purpose.SHARDS)
        order = ranked(random)
        lengths = self._lengths[order]
        ends = np.cumsum(lengths)
        begin = _bits(1, self._seed, epoch, self._node, 0, _Purpose.BEGIN)[0] % np.uint64(self.num_samples)
        return ends, self._starts[order] - (ends - lengths), int(begin)


def node_slots(global_batch_size: int) -> Ints:
    """Return the first slot of each canonical node, and then the number of slots, int64 [C + 1]."""
    count = min(CANONICAL_NODES, global_batch_size)
    return np.arange(count + 1) * global_batch_size // count


def nodes_of(slots: Ints, global_batch_size: int) -> Iterator[tuple[int, slice]]:
    """Yield the canonical nodes that serve `slots`, int64 [B], ascending, each with the range of its slots in them."""
    bounds = np.searchsorted(slots, node_slots(global_batch_size))
    for node, (first, last) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        if first < last:
            yield node, slice(first, last)


def window_of_node(shuffle_window: int, global_batch_size: int) -> int:
    """Return the window of one canonical node, in samples, from `shuffle_window` over all nodes."""
    return max(1, shuffle_window // min(CANONICAL_NODES, global_batch_size))


class _Purpose(IntEnum):
    """The last counter word of each use, distinct from those of `bd3_scale.diffusion.noise`.

    The numbers are part of every run's order: add new ones, never renumber.
    """

    SHARDS = 1 << 32
    BEGIN = SHARDS + 1
    SAMPLES = SHARDS + 2


def ranked(random: NDArray[np.uint64]) -> Ints:
    """Return the stable order of numbers. Without equal numbers every sort finds it; the default sort is faster."""
    order = random.argsort()
    in_order = random[order]
    return random.argsort(kind="stable") if (in_order[1:] == in_order[:-1]).any() else order


def _bits(count: int, seed: int, epoch: int, node: int, window: int, purpose: _Purpose) -> NDArray[np.uint64]:
    counter = np.array([0, window, node, purpose], dtype=np.uint64)
    return np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64), counter=counter).random_raw(count)
