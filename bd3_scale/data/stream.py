"""Yield the batches of training, equal for every number of ranks and workers, and those of the held-out split."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from bd3_scale.data.batch import Batch, collate
from bd3_scale.data.cache import default_window
from bd3_scale.data.earlier_order import EarlierOrder
from bd3_scale.data.loader import Workers
from bd3_scale.data.manifest import Manifest, SplitName
from bd3_scale.data.mixture import MixtureOrder, source_key
from bd3_scale.data.order import DataOrder, InOrder, Ints, Order, Sequences, WindowOrder
from bd3_scale.data.prefetch import prefetch_shards
from bd3_scale.data.shards import Shards, open_shards
from bd3_scale.recipe.schema import DataRecipe

PREFETCH_BATCHES = 8


class TrainingStream(Iterator[Batch]):
    """The batches of one data-parallel rank, one for each optimiser step, without end, from step `step` on.

    An epoch is ⌊N/G⌋ global batches, with G = `global_batch_size`, of the N sequences, none of them twice. Which
    sequence stands in which slot of the global batch is a pure function of (seed, step, N, G), the shard sizes and
    `order` (see `bd3_scale.data.order`); for a mixture also of the sources' weights and names (see
    `bd3_scale.data.mixture`). So a resume needs no stored state. Rank d of D = `dp_size` holds the slots d·G/D to
    (d+1)·G/D − 1. Ranks that must see the same sequences pass the same `dp_rank`.

    order: the order of the run; None: that of a new run, see `new_order`.
    reads: make batches; False: the stream yields none, but `batch_at` still tells their sequences.

    Collective over all ranks at construction. Raises ValueError if D does not divide G, if N < G, or as `open_shards`;
    `next` raises ValueError for a damaged shard, and as `Workers`.
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
        order: DataOrder | None = None,
        reads: bool = True,
    ) -> None:
        if global_batch_size % dp_size:
            raise ValueError(
                f"global_batch_size={global_batch_size} must be a multiple of the {dp_size} data-parallel ranks"
            )
        shards = open_sources(data, manifest, "train")
        for own, recipe in zip(shards.values(), data.by_source.values(), strict=True):
            if len(own) < global_batch_size:
                raise ValueError(
                    f"global_batch_size={global_batch_size} exceeds the {len(own)} training sequences of "
                    f"{recipe.path}; choose a smaller one or prepare more text"
                )
        self._data, self._global_batch_size, self._seed, self._shards = data, global_batch_size, seed, shards
        self._samples_per_shard = {name: own.samples_per_shard for name, own in shards.items()}
        self._kind = order or new_order(data, list(shards.values()), global_batch_size)
        self._batches: Iterator[Batch] = iter(())
        if reads:
            slots = np.arange(global_batch_size).reshape(dp_size, -1)[dp_rank]
            steps = _Steps(shards, self._order_of(slots), slots, data.isolate_documents, step)
            workers = data.num_workers
            self._batches = Workers(steps.batches, workers, PREFETCH_BATCHES) if workers else steps.batches(0, 1)

    @functools.cached_property
    def _whole(self) -> Order:
        return self._order_of(np.arange(self._global_batch_size))

    def batch_at(self, step: int) -> Sequences:
        """Return the sequences, by slot, of the global batch that follows `step` finished steps."""
        return self._whole.at(step)

    def _order_of(self, slots: Ints) -> Order:
        window = self._kind.shuffle_window if self._data.shuffle else None
        how: dict[str, Any] = {"shuffle_window": window, "seed": self._seed}
        if self._data.sources:
            return MixtureOrder(self._data, self._samples_per_shard, self._global_batch_size, slots, **how)
        (counts,) = self._samples_per_shard.values()
        if not self._data.shuffle:
            return InOrder(int(counts.sum()), self._global_batch_size, slots)
        if window is None:
            return EarlierOrder(counts, self._global_batch_size, slots, seed=self._seed)
        return WindowOrder(counts, self._global_batch_size, slots, **how)

    @property
    def downloads_per_shard(self) -> float | None:
        """Return the largest `ShardFiles.downloads_per_shard` of all sources; None without a remote."""
        values = (own.files.downloads_per_shard for own in self._shards.values() if own.has_remote)
        return max((downloads for downloads in values if downloads is not None), default=None)

    def __next__(self) -> Batch:
        return next(self._batches)


def open_sources(data: DataRecipe, manifest: Manifest, split: SplitName) -> dict[str, Shards]:
    """Return the samples of each source by its name; see `open_shards`."""
    return {name: open_shards(recipe, manifest.part(name), split) for name, recipe in data.by_source.items()}


def new_order(data: DataRecipe, shards: Iterable[Shards], global_batch_size: int) -> DataOrder:
    """Return the order of a run that begins with this version."""
    windows = (default_window(own.sizes, data.cache_limit, global_batch_size) for own in shards)
    return DataOrder(version=2, shuffle_window=data.shuffle_window or min(windows))


@dataclass(frozen=True)
class _Steps:
    """The batches of a rank from step `step` on. Worker w of W makes those of the steps `step` + w, + W, + 2W, …"""

    shards: Mapping[str, Shards]
    order: Order
    slots: Ints
    isolate_documents: bool
    step: int

    def batches(self, worker: int, num_workers: int) -> Iterator[Batch]:
        """Yield the batches of one of several workers."""
        shards = list(self.shards.values())
        keys = np.array([source_key(name) for name in self.shards])
        coming = map(self.order.at, itertools.count(self.step + worker, num_workers))
        for sequences in prefetch_shards(shards, coming, len(self.slots)):
            samples = [
                shards[source][sample] for source, sample in zip(sequences.sources, sequences.ids.tolist(), strict=True)
            ]
            how = {"epochs": sequences.epochs, "source_keys": keys[sequences.sources]}
            yield collate(samples, sequences.ids, self.slots, self.isolate_documents, **how)


def held_out_batches(
    data: DataRecipe, manifest: Manifest, *, batch_size: int, dp_rank: int, dp_size: int, sequences: int | None = None
) -> Iterator[Batch]:
    """Yield the first `sequences` (default: all) of the held-out split, each on one data-parallel rank, in order.

    Rank d of D gets the ids d, d + D, … All ranks get equally many batches of `batch_size` (smaller if one batch holds
    all). The last batch is filled with copies of id −1 that count no token. Slots are the ids; the epoch is 0.
    The first call in a process is collective over all ranks. Raises as `open_shards`.
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
    """Samples by number, in the form that `collate` takes."""

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
    """Yield batches as `held_out_batches`, of samples that are already open, or in memory."""
    num_sequences = len(samples) if sequences is None else min(sequences, len(samples))
    mine = np.arange(dp_rank, num_sequences, dp_size)
    # All ranks need as many batches as the rank with the most sequences: each batch is a collective.
    most = -(-num_sequences // dp_size)
    size = min(batch_size, most)
    filled = np.pad(mine, (0, -(-most // size) * size - len(mine)), constant_values=-1) if size else mine

    def batches() -> Iterator[Batch]:
        for start in range(0, len(filled), size or 1):
            ids = filled[start : start + size]
            batch = collate([samples[max(0, int(i))] for i in ids], ids, ids, isolate_documents)
            batch.counted[torch.from_numpy(ids < 0)] = False
            yield batch

    return batches()
