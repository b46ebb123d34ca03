"""Measure what the order of training data costs and how often shards are fetched: `python tools/bench_order.py`.

Indices are artificial: no shard is read. The first table times a rank's first batch and later ones. The second
simulates an epoch of a machine with a cache that evicts the least recently used shard.
"""

from __future__ import annotations

import argparse
import sys
import time
import tracemalloc
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # from a checkout that is not installed

import numpy as np

from bd3_scale.data.cache import DEFAULT_WINDOW, NodeCache, ShardSizes
from bd3_scale.data.mixture import MixtureOrder
from bd3_scale.data.order import Ints, Order, WindowOrder, nodes_of
from bd3_scale.observe.environment import cpu_in_words, software, source_commit
from bd3_scale.recipe.schema import DataRecipe

BATCH = 1024
COST = ("data", "ranks", "first batch, CPU s", "later ones, CPU ms", "most memory, MiB")
DOWNLOADS = ("sequences a batch", "machines", "shards of the machine", "cache, shards", "downloads a shard")


def cost(shards: int, samples: int) -> Iterator[list[str]]:
    """Yield the first table's rows, for `shards` shards of `samples` sequences."""
    counts = np.full(shards, samples)
    data = DataRecipe.model_validate(
        {"seq_len": 1, "sources": [{"name": f"s{n}", "path": "nowhere", "weight": n + 1} for n in range(10)]}
    )
    for ranks in (1, 8, 64):
        slots = np.arange(BATCH).reshape(ranks, -1)[0]

        def alone(slots: Ints = slots) -> Order:
            return WindowOrder(counts, BATCH, slots, shuffle_window=DEFAULT_WINDOW, seed=1)

        def mixed(slots: Ints = slots) -> Order:
            own = dict.fromkeys(data.by_source, counts[: shards // 10])
            return MixtureOrder(data, own, BATCH, slots, shuffle_window=DEFAULT_WINDOW, seed=1)

        for name, make in (("one source", alone), ("ten sources", mixed)):
            first, later = [], []
            for step in (1000, 2000, 3000):
                began = time.process_time()
                order = make()
                order.at(step)
                first.append(time.process_time() - began)
                began = time.process_time()
                for more in range(20):
                    order.at(step + 1 + more)
                later.append((time.process_time() - began) / 20)
            tracemalloc.start()
            make().at(1000)
            memory = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            cells = f"{np.median(first):.3f}", f"{1000 * np.median(later):.2f}", f"{memory / 2**20:.1f}"
            yield [f"{name}, {shards * samples:.2g} sequences", str(ranks), *cells]


def downloads(shards: int, samples: int, window: int) -> Iterator[list[str]]:
    """Yield the second table's rows."""
    for batch in (1024, 1000, 1023):
        for machines in (1, 8, 64):
            slots = np.arange(machines // 2 * batch // machines, (machines // 2 + 1) * batch // machines)
            order = WindowOrder(np.full(shards, samples), batch, slots, shuffle_window=window, seed=1)
            used = np.concatenate([order.at(step).ids for step in range(order.steps_per_epoch)]) // samples
            cache = NodeCache(ShardSizes(1, samples), batch, len(list(nodes_of(slots, batch))))
            room, touched = int(cache.needed(window) / samples), len(np.unique(used))
            fetched = misses(used, room) / touched
            yield [str(batch), str(machines), str(touched), str(room), f"{fetched:.3f}"]


def misses(shards: Ints, room: int) -> int:
    """Return how often a least-recently-used cache of `room` shards fetches one."""
    kept: OrderedDict[int, None] = OrderedDict()
    fetches = 0
    for shard in shards[np.diff(shards, prepend=-1) != 0].tolist():
        fetches += shard not in kept
        kept[shard] = None
        kept.move_to_end(shard)
        if len(kept) > room:
            kept.popitem(last=False)
    return fetches


def main(arguments: Sequence[str]) -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=600_000, help="of 4,000 sequences, for the first table")
    parser.add_argument("--replayed", type=int, default=4096, help="shards of 1,024 sequences, for the second")
    parser.add_argument("--window", type=int, default=DEFAULT_WINDOW, help="data.shuffle_window of the second")
    chosen = parser.parse_args(arguments)
    print(f"- {cpu_in_words()}; {software()['bd3_scale']}, commit {source_commit()}, numpy {np.__version__}")
    print(f"- command: python tools/bench_order.py {' '.join(arguments)}\n")
    for columns, rows in (
        (COST, cost(chosen.shards, 4000)),
        (DOWNLOADS, downloads(chosen.replayed, 1024, chosen.window)),
    ):
        print("|", " | ".join(columns), "|")
        print("|---" * len(columns) + "|")
        for cells in rows:
            print("|", " | ".join(cells), "|", flush=True)
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
