"""Compute data order 1, for runs that began before `bd3_scale.data.order` existed; it needs a whole epoch at once."""

from __future__ import annotations

import math

import numpy as np

from bd3_scale.data.mosaicml import get_shuffle
from bd3_scale.data.order import CANONICAL_NODES, Ints, Sequences

_BLOCK = 1 << 18


class EarlierOrder:
    """Order 1 of `slots`: streaming's py1e shuffle over gcd(G, 64) canonical nodes, each of which serves a range of
    slots.
    """

    def __init__(self, samples_per_shard: Ints, global_batch_size: int, slots: Ints, *, seed: int) -> None:
        self.steps_per_epoch = int(samples_per_shard.sum()) // global_batch_size
        self._samples_per_shard, self._global_batch_size = samples_per_shard, global_batch_size
        self._slots, self._seed = slots, seed
        # The slots of the last epoch: computing an epoch takes seconds for many sequences.
        self._own: tuple[int, Ints] | None = None

    def at(self, step: int) -> Sequences:
        """Return the sequences of the batch that follows `step` finished steps."""
        epoch, first = divmod(step, self.steps_per_epoch)
        if self._own is None or self._own[0] != epoch:
            order = epoch_order(self._samples_per_shard, self._global_batch_size, self._seed, epoch)
            self._own = epoch, order[:, self._slots]
        return Sequences.of_one(epoch, self._own[1][first])


def epoch_order(samples_per_shard: Ints, global_batch_size: int, seed: int, epoch: int) -> Ints:
    """Return the sample ids [⌊N/G⌋, G] of the global batches of an epoch, in order; no id twice."""
    num_samples = int(samples_per_shard.sum())
    num_steps = num_samples // global_batch_size
    num_nodes = math.gcd(global_batch_size, CANONICAL_NODES)
    order = get_shuffle("py1e", samples_per_shard, num_nodes, seed, epoch, _BLOCK)
    slots_per_node = global_batch_size // num_nodes
    node_starts = np.arange(num_nodes) * num_samples // num_nodes  # where streaming divides the samples
    places = node_starts[:, None] + np.arange(num_steps * slots_per_node)
    return order[places].reshape(num_nodes, num_steps, slots_per_node).swapaxes(0, 1).reshape(num_steps, -1)
