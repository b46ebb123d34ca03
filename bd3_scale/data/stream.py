"""The batches of training, the same for every number of ranks and workers, and those of the held-out split."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from bd3_scale.data.ahead import fetched_ahead
from bd3_scale.data.batch import Batch, collate
from bd3_scale.data.cache import CANONICAL_NODES, SHUFFLE_BLOCK_SAMPLES
from bd3_scale.data.loader import Workers
from bd3_scale.data.manifest import Manifest
from bd3_scale.data.mosaicml import get_shuffle
from bd3_scale.data.shards import Shards, open_shards
from bd3_scale.recipe.schema import DataRecipe

PREFETCH_BATCHES = 8


class TrainingStream(Iterator[Batch]):
    """The batches of one data-parallel rank, one an optimiser step, without end, from optimiser step `step` on.

    An epoch is ⌊N/G⌋ global batches of G = `global_batch_size` of the N sequences, none of them twice. Which sequence
    stands in which slot of the global batch is a pure function of (seed, step, N, G) and the shard sizes (see
    `epoch_order`): there is nothing to save for a resume. Rank d of D = `dp_size` holds the slots d·G/D to
    (d+1)·G/D − 1; ranks that must see the same sequences pass the same `dp_rank`.

    Collective over all ranks at construction. Raises ValueError if D does not divide G, if N < G, or as `open_shards`
    does; `next` raises ValueError for a damaged shard, and as `Workers` does.
    """

    def __init__(
        self,
        data: DataRecipe,
        manifest: Manifest,
        *,
        global_batch_size: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        step: int = 0,
    ) -> None:
        if global_batch_size % dp_size:
            raise ValueError(
                f"global_batch_size={global_batch_size} must be a multiple of the {dp_size} data-parallel ranks"
            )
        shards = open_shards(data, manifest, "train")
        self.steps_per_epoch = len(shards) // global_batch_size
        if not self.steps_per_epoch:
            raise ValueError(
                f"global_batch_size={global_batch_size} exceeds the {len(shards)} training sequences of {data.path}; "
                f"choose a smaller one or prepare more text"
            )
        self._steps = steps = _Steps(shards, data, global_batch_size, dp_rank, dp_size, seed, step)
        # Of the last epoch that was asked for: it takes seconds where there are many sequences.
        self._order: tuple[int, NDArray[np.int64]] | None = None
        self._batches: Iterator[Batch] = (
            Workers(steps.batches, data.num_workers, PREFETCH_BATCHES) if data.num_workers else steps.batches(0, 1)
        )

    def batch_at(self, step: int) -> tuple[int, list[int]]:
        """Return epoch and sample ids, by slot, of the whole global batch that follows `step` finished steps."""
        epoch, first = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self._steps.order(epoch)
        return epoch, self._order[1][first].tolist()

    @property
    def downloads_per_shard(self) -> float | None:
        """Return what `Shards.downloads_per_shard` says; None without a remote."""
        return self._steps.shards.downloads_per_shard if self._steps.shards.has_remote else None

    def __next__(self) -> Batch:
        return next(self._batches)


def epoch_order(
    samples_per_shard: NDArray[np.int64], global_batch_size: int, seed: int, epoch: int, shuffle: bool
) -> NDArray[np.int64]:
    """Return the sample ids [⌊N/G⌋, G] of the global batches of an epoch, in order; no id twice.

    The order is streaming's py1e shuffle over canonical nodes, of which each serves a fixed range of slots, so that
    a rank reads few shards at a time and the nodes of a cluster share out the shards. Their number depends on G alone.
    """
    num_samples = int(samples_per_shard.sum())
    num_steps = num_samples // global_batch_size
    if not shuffle:
        return np.arange(num_steps * global_batch_size).reshape(num_steps, global_batch_size)
    num_nodes = math.gcd(global_batch_size, CANONICAL_NODES)
    order = get_shuffle("py1e", samples_per_shard, num_nodes, seed, epoch, SHUFFLE_BLOCK_SAMPLES)
    slots_per_node = global_batch_size // num_nodes
    node_starts = np.arange(num_nodes) * num_samples // num_nodes  # where streaming divides the samples
    places = node_starts[:, None] + np.arange(num_steps * slots_per_node)
    return order[places].reshape(num_nodes, num_steps, slots_per_node).swapaxes(0, 1).reshape(num_steps, -1)


class _Steps:
    """Worker w of W has the steps `step` + w, + W, + 2W, …"""

    def __init__(
        self, shards: Shards, data: DataRecipe, global_batch_size: int, dp_rank: int, dp_size: int, seed: int, step: int
    ) -> None:
        per_rank = global_batch_size // dp_size
        self._slots = np.arange(dp_rank * per_rank, (dp_rank + 1) * per_rank)
        self.shards, self._data, self._global_batch_size = shards, data, global_batch_size
        self._seed, self._step = seed, step

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Return the order of an epoch; see `epoch_order`."""
        counts = self.shards.samples_per_shard
        return epoch_order(counts, self._global_batch_size, self._seed, epoch, self._data.shuffle)

    def batches(self, worker: int, num_workers: int) -> Iterator[Batch]:
        for epoch, ids in fetched_ahead(self.shards, self._places(worker, num_workers), len(self._slots)):
            samples = [self.shards[int(i)] for i in ids]
            yield collate(samples, ids, self._slots, epoch, self._data.isolate_documents)

    def _places(self, worker: int, num_workers: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield epoch and sample ids of each batch, without end."""
        step = self._step + worker
        while True:
            epoch, first = divmod(step, len(self.shards) // self._global_batch_size)
            order = self.order(epoch)
            mine = order[first::num_workers, self._slots]
            del order
            for ids in mine:
                yield epoch, ids
            step += num_workers * len(mine)


def held_out_batches(
    data: DataRecipe, manifest: Manifest, *, batch_size: int, dp_rank: int, dp_size: int, sequences: int | None = None
) -> Iterator[Batch]:
    """Yield the first `sequences` (default: all) of the held-out split, each on one data-parallel rank, in order.

    Rank d of D has the ids d, d + D, …, and all ranks as many batches of `batch_size`, or of fewer where that holds
    them all: what is left is filled with copies of id −1, that count no token. The slots are the ids, the epoch is 0.
    The first call in a process is collective over all ranks. Raises as `open_shards` does.
    """
    shards = open_shards(data, manifest, "validation")
    return batches_in_order(
        shards,
        isolate_documents=data.isolate_documents,
        batch_size=batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        sequences=sequences,
    )


class Samples(Protocol):
    """Samples by number, as `collate` takes them."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> dict[str, NDArray[Any]]: ...


def batches_in_order(
    samples: Samples,
    *,
    isolate_documents: bool,
    batch_size: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    sequences: int | None = None,
) -> Iterator[Batch]:
    """Yield what `held_out_batches` does, of samples that are open, or in memory."""
    num_sequences = len(samples) if sequences is None else min(sequences, len(samples))
    mine = np.arange(dp_rank, num_sequences, dp_size)
    most = -(-num_sequences // dp_size)
    size = min(batch_size, most)
    filled = np.pad(mine, (0, -(-most // size) * size - len(mine)), constant_values=-1) if size else mine

    def batches() -> Iterator[Batch]:
        for start in range(0, len(filled), size or 1):
            ids = filled[start : start + size]
            batch = collate([samples[max(0, int(i))] for i in ids], ids, ids, 0, isolate_documents)
            batch.counted[torch.from_numpy(ids < 0)] = False
            yield batch

    return batches()
