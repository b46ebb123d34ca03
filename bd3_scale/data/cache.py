"""How much of remote data a machine keeps, which decides how often it fetches them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from bd3_scale.data.index import SHARD_LIMIT
from bd3_scale.data.order import node_slots, nodes_of, window_of_node

# Of `data.shuffle_window` where a recipe leaves it out, in sequences; see `default_window`.
DEFAULT_WINDOW = 1 << 20
LEAST_DEFAULT = 1 << 16


@dataclass(frozen=True)
class ShardSizes:
    """Bytes of a data set's shards, as unpacked.

    Attributes:
        sequence: of one, on average.
        largest: the largest shard.
        total: of all shards; infinite where nobody has them here.
        beside: of what lies beside them, the index and a packed shard while it is unpacked.
    """

    sequence: float
    largest: float
    total: float = float("inf")
    beside: float = 0.0

    @classmethod
    def expected(cls, seq_len: int, num_ids: int) -> ShardSizes:
        """Return those of data that are not here: tokens alone, in shards as large as `prepare` makes them."""
        return cls(seq_len * (2 if num_ids <= 1 << 16 else 4), SHARD_LIMIT // 4)


@dataclass(frozen=True)
class NodeCache:
    """What one machine keeps of remote data with shards of these sizes, which reads for so many canonical nodes."""

    sizes: ShardSizes
    global_batch_size: int
    canonical_nodes: int

    @classmethod
    def of_fullest(
        cls, sizes: ShardSizes, global_batch_size: int, dp_ranks: Iterable[Iterable[int]], dp_size: int
    ) -> NodeCache:
        """Return that of the machine that reads for most of them. dp_ranks: the data-parallel ranks on each machine;
        rank d of D = `dp_size` serves the slots d·G/D to (d+1)·G/D − 1.
        """
        own = np.arange(global_batch_size).reshape(dp_size, -1)
        machines = (own[sorted(set(ranks))].flatten() for ranks in dp_ranks)
        most = max(len(list(nodes_of(slots, global_batch_size))) for slots in machines)
        return cls(sizes, global_batch_size, most)

    def needed(self, shuffle_window: int) -> float:
        """Return the bytes below which shards are fetched again and again: of every canonical node the window in use
        and the next, and the shard that they begin in.
        """
        windows = 2 * window_of_node(shuffle_window, self.global_batch_size) * self.sizes.sequence
        # Whole ones, or two would take turns where a window is less.
        shards = math.ceil(windows / self.sizes.largest) + 1
        read = self.canonical_nodes * shards * self.sizes.largest
        return self.sizes.beside + min(read, self.sizes.total)

    def fitting(self, cache_limit: str) -> int | None:
        """Return the largest window that fits, a power of two up to `DEFAULT_WINDOW`. None: not even the least does."""
        windows = (1 << power for power in range(DEFAULT_WINDOW.bit_length() - 1, -1, -1))
        return next((window for window in windows if self.needed(window) <= bytes_of(cache_limit)), None)

    def check(self, cache_limit: str, shuffle_window: int, *, may_change: bool) -> None:
        """Raise ValueError if the limit is below what is needed. may_change: the run has not begun with this window."""
        needed = self.needed(shuffle_window)
        if needed <= bytes_of(cache_limit):
            return
        fits = self.fitting(cache_limit) if may_change else None
        way_out = f"raise it to {_gigabytes(needed)}, take more machines"
        if fits is not None:
            way_out += f", or set data.shuffle_window={fits}"
        raise ValueError(
            f"data.cache_limit={cache_limit} is too small, and shards would be fetched again and again: "
            f"{self.told(shuffle_window)}; {way_out}"
        )

    def told(self, shuffle_window: int) -> str:
        """Say what is needed."""
        return (
            f"a machine reads from {_gigabytes(self.needed(shuffle_window))} at a time (data.shuffle_window="
            f"{shuffle_window}, {self.canonical_nodes} of {len(node_slots(self.global_batch_size)) - 1} parts)"
        )


def default_window(sizes: ShardSizes, cache_limit: str | None, global_batch_size: int) -> int:
    """Return `data.shuffle_window` where a recipe leaves it out: what fits into the cache of one machine that is alone,
    2^16 to 2^20 sequences.

    More machines need less each, so that it fits wherever the run is moved; if it hung on their number, so would the
    order.
    """
    if cache_limit is None:
        return DEFAULT_WINDOW
    alone = NodeCache(sizes, global_batch_size, len(node_slots(global_batch_size)) - 1)
    return max(LEAST_DEFAULT, alone.fitting(cache_limit) or 0)


def _gigabytes(size: float) -> str:
    """Return it as a `cache_limit` is written, rounded up."""
    unit, scale = ("gb", 2**30) if size > 2**30 else ("mb", 2**20)
    return f"{math.ceil(size / scale * 10) / 10:g}{unit}"


def bytes_of(limit: str) -> float:
    """Return the bytes of such as 100gb, in powers of 1,024 as streaming reads it."""
    return float(limit[:-2]) * 1024.0 ** (1 + "kmgt".index(limit[-2].lower()))
