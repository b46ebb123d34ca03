from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bd3_scale.data.cache import DEFAULT_WINDOW, MIN_DEFAULT_WINDOW, NodeCache, ShardSizes, bytes_of, default_window
from bd3_scale.data.order import node_slots

GB = 2**30
# 4,096 tokens of two bytes; 1,000 shards of 64 MiB.
SIZES = ShardSizes(8192, 2**26, 1000 * 2**26, 10**6)
LIMITS = st.floats(0.001, 2000).map(lambda size: f"{size:.3f}gb")


@given(st.integers(1, 40), st.integers(1, 16), st.integers(1, 9), st.sampled_from([1, 2, 4]))
def test_the_fullest_machine_is_found(dp_size, per_rank, ranks_per_machine, beside):
    batch = dp_size * per_rank
    ranks = [rank // beside for rank in range(dp_size * beside)]
    machines = [ranks[first : first + ranks_per_machine] for first in range(0, len(ranks), ranks_per_machine)]
    bounds = node_slots(batch).tolist()
    node_of = [max(node for node, first in enumerate(bounds[:-1]) if first <= slot) for slot in range(batch)]
    serves = [{node_of[rank * per_rank + i] for rank in machine for i in range(per_rank)} for machine in machines]
    found = NodeCache.of_fullest(SIZES, batch, machines, dp_size)
    assert found.canonical_nodes == max(map(len, serves))


def test_what_is_needed():
    of_eight = NodeCache(SIZES, 1024, 8)
    # 2^20 / 64 sequences are a window of each canonical node.
    assert of_eight.needed(1 << 20) == 10**6 + 8 * (4 + 1) * 2**26
    assert of_eight.needed(1 << 30) == 10**6 + SIZES.total
    # Of a shard that two windows lie in, they may begin in the one before.
    assert NodeCache(SIZES, 3, 3).needed(30) == 10**6 + 3 * 2 * 2**26
    assert ShardSizes.expected(4096, 70_000).sequence == 2 * ShardSizes.expected(4096, 50_000).sequence == 16384


@given(LIMITS, st.integers(1, 64))
def test_the_window_that_fits_is_the_largest(limit, nodes):
    cache = NodeCache(SIZES, 1024, nodes)
    found = cache.fitting(limit)
    assert found is None or cache.needed(found) <= bytes_of(limit)
    if found != DEFAULT_WINDOW:
        assert cache.needed(2 * (found or 0) or 1) > bytes_of(limit)


@given(LIMITS, st.integers(1, 2048), st.integers(1, 64))
def test_the_default_fits_on_more_machines_than_one_if_it_fits_there(limit, batch, machines):
    window = default_window(SIZES, limit, batch)
    assert MIN_DEFAULT_WINDOW <= window <= DEFAULT_WINDOW
    alone = NodeCache(SIZES, batch, len(node_slots(batch)) - 1)
    if alone.needed(MIN_DEFAULT_WINDOW) <= bytes_of(limit):
        assert alone.needed(window) <= bytes_of(limit)
    share = -(-alone.canonical_nodes // machines)
    assert NodeCache(SIZES, batch, share).needed(window) <= alone.needed(window)


def test_a_cache_that_is_too_small_is_refused_with_what_would_do():
    cache = NodeCache(SIZES, 1024, 16)
    cache.check("5.1gb", DEFAULT_WINDOW, may_change=True)
    with pytest.raises(ValueError, match=r"data\.cache_limit=3gb is too small") as refused:
        cache.check("3gb", DEFAULT_WINDOW, may_change=True)
    told = re.search(r"reads from (\S+) at a time .*; raise it to (\S+), .*shuffle_window=(\d+)$", str(refused.value))
    assert told is not None
    needed, raised, window = told.groups()
    cache.check(raised, DEFAULT_WINDOW, may_change=True)
    cache.check("3gb", int(window), may_change=True)
    assert (needed, int(window)) == (raised, 1 << 18)
    # A run that has begun cannot take another; and below a shard of each, none fits.
    for limit, may_change in (("3gb", False), ("500mb", True)):
        with pytest.raises(ValueError, match=r"too small.*take more machines$"):
            cache.check(limit, DEFAULT_WINDOW, may_change=may_change)
    assert default_window(SIZES, None, 1024) == DEFAULT_WINDOW
