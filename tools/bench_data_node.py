"""Measure what prepared data cost a machine, for tools/bench_data.py: start, memory and downloads."""

from __future__ import annotations

import gc
import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tools.bench_data_child import MIB, cpu_seconds, memory
from tools.bench_data_loader import BATCH, SEED, batches_of, streaming_as_it_stands

# Sizes of the artificial shards for a start; all shards have equal content.
START_SEQ_LEN, START_SAMPLES = 32, 4096
START_BATCH, WORKERS, STEPS = 64, 2, 40
# For the cache: one slot of a batch per canonical node; a cache that thrashes is stopped after the second number.
CACHE_BATCH, MOST_SECONDS = 8, 20.0


def multiplied(data: str, out: str, shards: int, made: Iterable[int] | None = None) -> dict[str, Any]:
    """Write prepared data whose training split repeats that of `data`.

    The index has `shards` shards; the files of those in `made` (default: all) are hard links.
    """
    source, place = Path(data, "train"), Path(out, "train")
    place.mkdir(parents=True)
    own = json.loads((source / "index.json").read_text())["shards"]
    texts = [json.dumps(shard) for shard in own]
    with (place / "index.json").open("w") as file:
        file.write('{"shards": [')
        for number in range(shards):
            shard = number % len(own)
            file.write(", " * (number > 0) + texts[shard].replace(f"shard.{shard:05}.", f"shard.{number:05}."))
        file.write('], "version": 2}')
    for number in range(shards) if made is None else made:
        shard = number % len(own)
        os.link(source / f"shard.{shard:05}.mds.zstd", place / f"shard.{number:05}.mds.zstd")
    whole, left = divmod(shards, len(own))
    counts = [shard["samples"] for shard in own]
    manifest = json.loads(Path(data, "manifest.json").read_text())
    manifest["train"]["sequences"] = whole * sum(counts) + sum(counts[:left])
    Path(out, "manifest.json").write_text(json.dumps(manifest))
    for path in Path(data).glob("tokenizer*"):
        os.link(path, Path(out, path.name))
    return {"sequences": manifest["train"]["sequences"], "bytes": (place / "index.json").stat().st_size}


def small_shards(data: str, out: str, seq_len: int, shard_bytes: int) -> dict[str, Any]:
    """Prepare lines as documents, in small shards."""
    from bd3_scale.data import split_writer
    from bd3_scale.data.prepare import prepare
    from bd3_scale.data.tokenizer import load_tokenizer

    split_writer.SHARD_BYTES = shard_bytes
    tokenizer = load_tokenizer(f"{data}/tokenizer")
    found = prepare([f"{data}/lines.jsonl"], out, tokenizer, seq_len, holdout=0.0, workers=1, progress=False)
    assert found.train is not None
    return {"sequences": found.train.sequences, "shards": len(found.train.shards)}


def read_first(data: str, shards: int) -> set[int]:
    """Return which of `shards` shards like those of `data` the first steps of all ranks read."""
    import numpy as np

    from bd3_scale.data.cache import DEFAULT_WINDOW
    from bd3_scale.data.order import WindowOrder

    own = json.loads(Path(data, "train/index.json").read_text())["shards"]
    counts = np.resize([shard["samples"] for shard in own], shards)
    slots = np.arange(START_BATCH)
    order = WindowOrder(counts, START_BATCH, slots, shuffle_window=DEFAULT_WINDOW, seed=SEED)
    ids = np.concatenate([order.at(step).ids for step in range(min(STEPS, order.steps_per_epoch))])
    return set(np.searchsorted(np.cumsum(counts), ids, side="right").tolist())


def bd3_scale_starts(data: str, local: str, rendezvous: str) -> dict[str, Any]:
    """Open data as a rank of a training does, up to its first batch."""
    from bd3_scale.data.manifest import load_manifest
    from bd3_scale.data.stream import TrainingStream
    from bd3_scale.recipe.schema import DataRecipe

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    def first() -> object:
        manifest = load_manifest(local, data)
        recipe = DataRecipe(path=local, remote=data, seq_len=START_SEQ_LEN, num_workers=WORKERS)
        how: dict[str, Any] = {"global_batch_size": START_BATCH, "dp_rank": rank, "dp_size": ranks, "seed": SEED}
        stream = TrainingStream(recipe, manifest, **how)
        return next(stream), stream

    return _started(first, rendezvous)


def streaming_starts(data: str, local: str, rendezvous: str) -> dict[str, Any]:
    """Open the same shards with an unchanged StreamingDataset and PyTorch's loader."""
    dataset_of = streaming_as_it_stands().StreamingDataset

    def first() -> object:
        batch = START_BATCH // int(os.environ["WORLD_SIZE"])
        dataset = dataset_of(remote=data, local=local, split="train", shuffle=True, batch_size=batch)
        batches = iter(batches_of(dataset, WORKERS))
        return next(batches), batches

    return _started(first, rendezvous)


def _started(first: Any, rendezvous: str) -> dict[str, Any]:
    """Return the seconds to the first batch, of this rank, and the MiB of it and its workers before and after."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    place: dict[str, Any] = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", **place)
    dist.barrier()
    before, cpu, began = memory([os.getpid()]), cpu_seconds(), time.perf_counter()
    batch = first()
    seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu
    dist.barrier()
    after = memory([os.getpid()])
    dist.barrier()
    del batch
    dist.destroy_process_group()
    return {"seconds": seconds, "cpu": cpu, "before": before, "after": after}


def memory_kept(data: str, local: str, epochs: int) -> dict[str, Any]:
    """Return MiB early in the first epoch and after each epoch: a rank's, its largest worker's, and the PSS of all."""
    import psutil

    from bd3_scale.data.manifest import load_manifest
    from bd3_scale.data.stream import TrainingStream
    from bd3_scale.recipe.schema import DataRecipe

    manifest = load_manifest(local, data)
    assert manifest.train is not None
    steps = manifest.train.sequences // BATCH
    recipe = DataRecipe(path=local, remote=data, seq_len=manifest.seq_len, num_workers=WORKERS)
    stream = TrainingStream(recipe, manifest, global_batch_size=BATCH, dp_rank=0, dp_size=1, seed=SEED)
    found, done = [], 0
    for until in (steps // 10, *(steps * epoch for epoch in range(1, epochs + 1))):
        for _ in range(until - done):
            next(stream)
        done = until
        gc.collect()
        workers = [child.memory_info().rss / MIB for child in psutil.Process().children(recursive=True)]
        found.append([psutil.Process().memory_info().rss / MIB, max(workers), memory([os.getpid()])])
    return {"mib": found, "steps": steps}


def downloads(data: str, caches: str, window: int, share: float) -> dict[str, Any]:
    """Return how often shards are fetched in an epoch if the cache has `share` of what `window` needs.

    Measured with the order of windows and with the order of older runs.
    """
    from bd3_scale.data.cache import NodeCache
    from bd3_scale.data.manifest import load_manifest
    from bd3_scale.data.order import EARLIER, DataOrder
    from bd3_scale.data.shards import open_shards
    from bd3_scale.recipe.schema import DataRecipe

    manifest = load_manifest(f"{caches}/whole", data)
    whole = DataRecipe(path=f"{caches}/whole", remote=data, seq_len=manifest.seq_len, num_workers=0)
    cache = NodeCache(open_shards(whole, manifest, "train").sizes, CACHE_BATCH, CACHE_BATCH)
    limit = f"{math.ceil(share * cache.needed(window) / 1024)}kb"
    try:
        cache.check(limit, window, may_change=True)
        told = "taken"
    except ValueError:
        told = "refused"
    orders = []
    for name, order in (("windows", DataOrder(version=2, shuffle_window=window)), ("earlier", EARLIER)):
        load_manifest(f"{caches}/{name}", data)
        limited = whole.model_copy(update={"path": f"{caches}/{name}", "cache_limit": limit})
        try:
            orders.append(_downloaded(limited, manifest, order))
        except ValueError:
            if told == "taken":
                raise
            orders.append("not even a few shards")
    return {"limit": limit, "told": told, "orders": orders}


def _downloaded(data: Any, manifest: Any, order: Any) -> str:
    from bd3_scale.data.stream import TrainingStream

    how = {"global_batch_size": CACHE_BATCH, "dp_rank": 0, "dp_size": 1, "seed": SEED, "order": order}
    stream = TrainingStream(data, manifest, **how)
    steps = manifest.train.sequences // CACHE_BATCH
    ends = time.monotonic() + MOST_SECONDS
    for step in range(steps):
        next(stream)
        if time.monotonic() > ends:
            return f"{stream.downloads_per_shard:.2f} in {(step + 1) / steps:.0%} of an epoch"
    return f"{stream.downloads_per_shard:.2f}"
