"""Compute how much remote data a machine must cache, and choose a shuffle window that fits its cache."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from bd3_scale.data.index import SHARD_LIMIT
from bd3_scale.data.order import node_slots, nodes_of, window_of_node

# The default of `data.shuffle_window`, in sequences, if all fits; see `default_window`.
DEFAULT_WINDOW = 1 << 20
MIN_DEFAULT_WINDOW = 1 << 16


@dataclass(frozen=True)
class ShardSizes:
    """Sizes of a data set's unpacked shards, in bytes.

    Attributes:
        sequence: average size of a sequence.
        largest: size of the largest shard.
        total: size of all shards; infinite if the data are not known yet.
        overhead: further files: the index, and one packed shard while it is unpacked.
    """

    sequence: float
    largest: float
    total: float = float("inf")
    overhead: float = 0.0

    @classmethod
    def expected(cls, seq_len: int, num_ids: int) -> ShardSizes:
        """Return the expected sizes of data that are not available: tokens alone, in shards of `prepare`'s size."""
        return cls(seq_len * (2 if num_ids <= 1 << 16 else 4), SHARD_LIMIT // 4)


@dataclass(frozen=True)
class NodeCache:
    """The cache of one machine that reads remote data for `canonical_nodes` canonical nodes."""

    sizes: ShardSizes
    global_batch_size: int
    canonical_nodes: int

    @classmethod
    def of_fullest(
        cls, sizes: ShardSizes, global_batch_size: int, dp_ranks: Iterable[Iterable[int]], dp_size: int
    ) -> NodeCache:
        """Return the cache of the machine that serves the most canonical nodes.

        dp_ranks: the data-parallel ranks on each machine; rank d of D = `dp_size` serves slots d·G/D to (d+1)·G/D − 1.
        """
        own = np.arange(global_batch_size).reshape(dp_size, -1)
        machines = (own[sorted(set(ranks))].flatten() for ranks in dp_ranks)
        most = max(len(list(nodes_of(slots, global_batch_size))) for slots in machines)
        return cls(sizes, global_batch_size, most)

    def needed(self, shuffle_window: int) -> float:
        """Return the bytes below which shards would be fetched repeatedly.

        For every canonical node: the current window, the next one, and the shard that they begin in.
        """
        windows = 2 * window_of_node(shuffle_window, self.global_batch_size) * self.sizes.sequence
        # Rounded up to whole shards: with less than two, the shards of a small window would evict each other.
        shards = math.ceil(windows / self.sizes.largest) + 1
        read = self.canonical_nodes * shards * self.sizes.largest
        return self.sizes.overhead + min(read, self.sizes.total)

    def fitting(self, cache_limit: str) -> int | None:
        """Return the largest window that fits, a power of two up to `DEFAULT_WINDOW`; None if none fits."""
        windows = (1 << power for power in range(DEFAULT_WINDOW.bit_length() - 1, -1, -1))
        return next((window for window in windows if self.needed(window) <= bytes_of(cache_limit)), None)

    def check(self, cache_limit: str, shuffle_window: int, *, may_change: bool) -> None:
        """Raise ValueError if the limit is below `needed`. may_change: the run is new and may use another window."""
        needed = self.needed(shuffle_window)
        if needed <= bytes_of(cache_limit):
            return
        fits = self.fitting(cache_limit) if may_change else None
        way_out = f"raise it to {_gigabytes(needed)}, take more machines"
        if fits is not None:
            way_out += f", or set data.shuffle_window={fits}"
        raise ValueError(
            f"data.cache_limit={cache_limit} is too small, and shards would be fetched again and again: "
            f"{self.describe(shuffle_window)}; {way_out}"
        )

    def describe(self, shuffle_window: int) -> str:
        """Return what is needed, in words."""
        return (
            f"a machine reads from {_gigabytes(self.needed(shuffle_window))} at a time (data.shuffle_window="
            f"{shuffle_window}, {self.canonical_nodes} of {len(node_slots(self.global_batch_size)) - 1} parts)"
        )


def default_window(sizes: ShardSizes, cache_limit: str | None, global_batch_size: int) -> int:
    """Return the default of `data.shuffle_window`: the window that fits the cache of a single machine, 2^16 to 2^20.

    With more machines each needs less, so the window fits wherever the run moves. It must not depend on the number of
    machines, because the order of the data depends on it.
    """
    if cache_limit is None:
        return DEFAULT_WINDOW
    single = NodeCache(sizes, global_batch_size, len(node_slots(global_batch_size)) - 1)
    return max(MIN_DEFAULT_WINDOW, single.fitting(cache_limit) or 0)


def _gigabytes(size: float) -> str:
    """Return a size in the format of `cache_limit`, rounded up."""
    unit, scale = ("gb", 2**30) if size > 2**30 else ("mb", 2**20)
    return f"{math.ceil(size / scale * 10) / 10:g}{unit}"


def bytes_of(limit: str) -> float:
    """Return the bytes of a limit such as 100gb, in powers of 1,024 like MosaicML streaming."""
    return float(limit[:-2]) * 1024.0 ** (1 + "kmgt".index(limit[-2].lower()))
