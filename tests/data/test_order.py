from __future__ import annotations

import itertools
import time
import timeit
import tracemalloc
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from bd3_scale.data.cache import NodeCache, ShardSizes
from bd3_scale.data.earlier_order import EarlierOrder, epoch_order
from bd3_scale.data.order import InOrder, NodeOrder, Order, WindowOrder, node_slots, nodes_of, ranked

SHARDS = st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any)


def window_order(shards: Sequence[int], batch: int, slots: np.ndarray, window: int, seed: int = 7) -> WindowOrder:
    return WindowOrder(np.array(shards), batch, slots, shuffle_window=window, seed=seed)


def node_order(shards: Sequence[int], batch: int, node: int, window: int, seed: int = 7) -> NodeOrder:
    return NodeOrder(np.cumsum(shards), batch, node, shuffle_window=window, seed=seed)


@given(SHARDS, st.integers(1, 130), st.integers(1, 400), st.integers(0, 2**63 - 1), st.data())
def test_no_id_comes_twice_in_an_epoch_on_any_topology(shards, batch, window, seed, data):
    num_steps = sum(shards) // batch
    if not num_steps:
        return
    ranks = data.draw(st.sampled_from([ranks for ranks in range(1, batch + 1) if batch % ranks == 0]))
    slots, counts = np.arange(batch), np.array(shards)
    whole: list[Order] = [
        window_order(shards, batch, slots, window, seed),
        EarlierOrder(counts, batch, slots, seed=seed),
        InOrder(sum(shards), batch, slots),
    ]
    epoch = data.draw(st.integers(0, 3))
    parts = [window_order(shards, batch, own, window, seed) for own in slots.reshape(ranks, -1)]
    for order in whole:
        assert order.steps_per_epoch == num_steps
        found = [order.at(step) for step in range(epoch * num_steps, (epoch + 1) * num_steps)]
        assert all((sequences.epochs == epoch).all() and not sequences.sources.any() for sequences in found)
        ids = np.array([sequences.ids for sequences in found])
        assert ids.shape == (num_steps, batch)
        assert len(np.unique(ids)) == ids.size
        assert ids.min() >= 0
        assert ids.max() < sum(shards)
    # Ranks begin anywhere and skip, as a resume and loader workers do.
    for step in data.draw(st.permutations(range(epoch * num_steps, (epoch + 1) * num_steps)))[:5]:
        of_ranks = np.concatenate([order.at(step).ids for order in parts])
        assert of_ranks.tolist() == whole[0].at(step).ids.tolist()


def plainly(shards: Sequence[int], batch: int, node: int, window: int, seed: int, epoch: int) -> list[int]:
    """Compute the order of one node's samples with lists and loops."""

    def bits(count: int, of_window: int, purpose: int) -> list[int]:
        counter = np.array([0, of_window, node, 2**32 + purpose], np.uint64)
        return np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=counter).random_raw(count).tolist()

    num_nodes, total = min(64, batch), sum(shards)
    first, last = ((node + end) * batch // num_nodes * total // batch for end in (0, 1))
    pieces, sample = [], 0
    for count in shards:
        pieces += [own] if (own := [i for i in range(sample, sample + count) if first <= i < last]) else []
        sample += count
    row = [i for _, piece in sorted(zip(bits(len(pieces), 0, 0), pieces, strict=True)) for i in piece]
    begin = bits(1, 0, 1)[0] % len(row)
    row, size = row[begin:] + row[:begin], max(1, window // num_nodes)
    windows = [row[start : start + size] for start in range(0, len(row), size)]
    return [i for n, part in enumerate(windows) for _, i in sorted(zip(bits(len(part), n, 2), part, strict=True))]


@given(SHARDS, st.integers(1, 70), st.integers(1, 300), st.integers(0, 2**63 - 1), st.integers(0, 5), st.data())
def test_the_order_is_what_it_says(shards, batch, window, seed, epoch, data):
    node = data.draw(st.integers(0, min(64, batch) - 1))
    order = node_order(shards, batch, node, window, seed)
    if order.num_samples:
        expected = plainly(shards, batch, node, window, seed, epoch)
        assert order.ids(epoch, np.arange(order.num_samples)).tolist() == expected


def test_the_order_stays_as_it_is():
    """Compare with stored values: runs that have begun depend on this order, and on order 1."""
    shards = np.array([100, 31, 64, 7, 230, 100, 100])
    new = WindowOrder(shards, 24, np.arange(24), shuffle_window=240, seed=3)
    old = EarlierOrder(shards, 24, np.arange(24), seed=3)
    assert xxhash.xxh64(np.array([new.at(step).ids for step in range(60)]).tobytes()).hexdigest() == "0cad430f175a7acf"
    assert xxhash.xxh64(np.array([old.at(step).ids for step in range(60)]).tobytes()).hexdigest() == "bc2ccc9bc233b3f6"
    assert new.at(0).ids[:8].tolist() == [22, 51, 59, 100, 130, 133, 176, 188]


@given(st.integers(1, 3000), st.integers(0, 10**7))
def test_every_canonical_node_has_samples_for_all_its_slots(batch, more):
    total = batch + more
    bounds = node_slots(batch)
    assert (bounds[0], bounds[-1], len(bounds) - 1) == (0, batch, min(64, batch))
    for node, rows in nodes_of(np.arange(batch), batch):
        slots = rows.stop - rows.start
        assert slots == bounds[node + 1] - bounds[node] > 0
        assert node_order([total], batch, node, 1).num_samples >= total // batch * slots


@pytest.mark.parametrize("shards", [[40] * 10, [150, 10, 3, 90, 60, 87]])
@pytest.mark.parametrize("window", [25, 70, 1000])
def test_a_sample_is_equally_likely_at_every_place(shards, window):
    """Check it for various sizes of shards and windows; each epoch and each seed is a draw."""
    for seeds, epochs in ((1, 600), (600, 1)):
        orders = [node_order(shards, 1, 0, window, seed) for seed in range(seeds)]
        places = np.array([_place_of(order, epoch, 123) for order in orders for epoch in range(epochs)])
        counts = np.bincount(places // 40, minlength=10)
        # Of 9 degrees of freedom, one in 40,000 is above.
        assert np.sum((counts - 60) ** 2 / 60) < 37


def _place_of(order: NodeOrder, epoch: int, sample: int) -> int:
    return int(np.flatnonzero(order.ids(epoch, np.arange(order.num_samples)) == sample)[0])


def test_two_epochs_are_as_different_as_two_seeds():
    """Count neighbours in one order within eight places in the other, and batches that share samples."""
    shards = [64] * 40
    one, other = node_order(shards, 1, 0, 256, seed=1), node_order(shards, 1, 0, 256, seed=2)
    every = np.arange(one.num_samples)
    epochs = [one.ids(epoch, every) for epoch in range(60)]
    seeds = [other.ids(epoch, every) for epoch in range(60)]
    between_epochs = np.array([_shared(a, b) for a, b in itertools.pairwise(epochs)])
    between_seeds = np.array([_shared(a, b) for a, b in zip(epochs, seeds, strict=True)])
    error = np.sqrt(between_epochs.var() / len(between_epochs) + between_seeds.var() / len(between_seeds))
    assert abs(between_epochs.mean() - between_seeds.mean()) < 4 * error
    assert between_epochs.mean() < 0.05


def _shared(one: np.ndarray, other: np.ndarray) -> float:
    place = np.argsort(other)
    return float(np.mean(np.abs(np.diff(place[one])) <= 8))


@pytest.mark.alone
@given(st.lists(st.integers(0, 5) | st.integers(0, 2**64 - 1), max_size=60))
def test_the_faster_sort_is_the_stable_one(numbers: list[int]) -> None:
    found = ranked(np.array(numbers, np.uint64))
    assert found.tolist() == sorted(range(len(numbers)), key=numbers.__getitem__)


def test_the_first_batch_is_cheap_at_billions_of_sequences():
    shards = np.full(600_000, 4000)
    for ranks, most_seconds, most_bytes in ((1, 0.2, 2**26), (64, 0.05, 2**25)):
        slots = np.arange(1024).reshape(ranks, -1)[-1]

        def first_batch(step: int, slots: np.ndarray = slots) -> None:
            WindowOrder(shards, 1024, slots, shuffle_window=1 << 20, seed=1).at(step)

        assert (
            min(timeit.repeat(lambda: first_batch(10**6), number=1, repeat=3, timer=time.process_time)) < most_seconds
        )
        tracemalloc.start()
        first_batch(10**7)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < most_bytes


@pytest.mark.parametrize("batch", [1024, 1000, 1023])
@pytest.mark.parametrize("machines", [1, 8, 64])
@pytest.mark.parametrize("window", [1 << 15, 1 << 10])
def test_a_machine_fetches_its_shards_once_with_the_cache_that_it_is_told(batch, machines, window):
    """Check it also for windows smaller than a shard."""
    shards, per_shard = np.full(4096, 32), 32
    slots = np.arange(machines // 2 * batch // machines, (machines // 2 + 1) * batch // machines)
    order = WindowOrder(shards, batch, slots, shuffle_window=window, seed=1)
    ids = np.concatenate([order.at(step).ids for step in range(order.steps_per_epoch)])
    nodes = len(list(nodes_of(slots, batch)))
    cache = NodeCache(ShardSizes(sequence=1, largest=per_shard), batch, nodes).needed(window) / per_shard
    used = ids // per_shard
    touched = len(np.unique(used))
    assert touched <= 1.05 * len(shards) * len(slots) / batch + nodes
    assert _misses(used, round(cache)) <= 1.05 * touched
    if window > 64 * per_shard:
        assert _misses(used, round(cache / 4)) > 5 * touched


def _misses(shards: np.ndarray, room: int) -> int:
    """Return how often an LRU cache of a given size fetches a shard."""
    kept: OrderedDict[int, None] = OrderedDict()
    misses = 0
    for shard in shards[np.diff(shards, prepend=-1) != 0].tolist():
        misses += shard not in kept
        kept[shard] = None
        kept.move_to_end(shard)
        if len(kept) > room:
            kept.popitem(last=False)
    return misses


def test_order_1_shares_out_the_shards():
    orders = [epoch_order(np.full(64, 10), 12, 7, epoch) for epoch in range(40)]
    assert set(np.concatenate(orders).flatten().tolist()) == set(range(640))
    # gcd(12, 64) = 4 canonical nodes of three slots, which have 16 of the 64 shards each
    touched = [set((orders[0][:, 3 * node : 3 * node + 3] // 10).flatten().tolist()) for node in range(4)]
    assert [len(shards_of_node) for shards_of_node in touched] == [16] * 4
    assert len(set.union(*touched)) == 64
