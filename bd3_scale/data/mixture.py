"""Compute the source of each sequence of a mixture, as a pure function of the weights: nothing is stored for a resume.

Every canonical node divides its own slots among the sources, so that it reads its own part of every source. After j of
its slots in a stage, the heaviest source has had ⌊p·j + φ⌋ of them, where p is its share; the next one ⌊p'·j' + φ'⌋ of
the j' slots that remain, where p' is its share without the first source, and so on. These counts rise by one at a time
and add up to j; each is less than 3 off its quota p·j. The phases φ differ from node to node: they form a Korobov
lattice, c·101^i mod C for node c of C and source i. So the errors of the nodes cancel: over all nodes, a count is at
most half a sequence off its quota with two sources, less than 3 with three and less than 9 with ten, after every step
of a stage of any length.

The k-th sequence that a node takes of a source, counted from the beginning of the run, is at place k of the node's
part in that source's own order (see `bd3_scale.data.order`). So no sequence is skipped or repeated, whatever the
stages are.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from bd3_scale.data.manifest import Manifest
from bd3_scale.data.order import Ints, NodeOrder, Sequences, node_slots, nodes_of
from bd3_scale.recipe.data import DataRecipe, MixtureStage
from bd3_scale.recipe.schema import Recipe

# The largest sum of integer weights: products with the phases' denominator then stay within int64.
_MAX_TOTAL = 1 << 26
_GENERATOR = 101  # a prime above the largest number of canonical nodes, 64, so that its powers mod C repeat late


def source_key(name: str) -> int:
    """Return the key in [0, 2^63) that a source's name adds to the seed of its order and noise; 0 without a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1 if name else 0


class NodeMixture:
    """The sources of one canonical node's slots, numbered as in `names`."""

    def __init__(self, stages: Sequence[MixtureStage], names: Sequence[str], global_batch_size: int, node: int) -> None:
        bounds = node_slots(global_batch_size).tolist()
        self._slots = bounds[node + 1] - bounds[node]
        self._stages: list[_Stage] = []
        taken, first = np.zeros((len(names), 1), np.int64), 0
        for stage in stages:
            new = _Stage(first, taken, tuple(_levels(stage.weights, names, len(bounds) - 1, node)))
            self._stages.append(new)
            if stage.until is not None:
                taken = new.taken(np.array([(stage.until - first) * self._slots]))
                first = stage.until

    def taken(self, step: int) -> Ints:
        """Return how many sequences of each source the first `step` steps take, int64 [S]."""
        stage = self._stage_at(step)
        return stage.taken(np.array([(step - stage.first_step) * self._slots]))[:, 0]

    def at(self, step: int, own: Ints) -> tuple[Ints, Ints]:
        """Return the source of each of the node's slots `own`, int64 [B], and how many of that source came before it.

        step: the number of finished steps.
        """
        stage = self._stage_at(step)
        places = (step - stage.first_step) * self._slots + own
        before = stage.taken(places)
        # Counts rise by one at a time: a slot belongs to the source whose count rises there.
        sources = (stage.taken(places + 1) - before).argmax(0)
        return sources, before[sources, np.arange(len(own))]

    def _stage_at(self, step: int) -> _Stage:
        return [stage for stage in self._stages if stage.first_step <= step][-1]


@dataclass(frozen=True)
class _Level:
    """A source's count ⌊(weight·j)/left + (phase + ½)/nodes⌋ among the j sequences that heavier sources leave."""

    source: int
    weight: int
    left: int
    phase: int
    nodes: int

    def of(self, sequences: Ints) -> Ints:
        """Return the count after each of `sequences`, int64 [J]."""
        # Split into quotient and remainder: the product of all factors would overflow int64.
        whole, rest = np.divmod(sequences, self.left)
        parts = 2 * self.nodes
        added = (rest * self.weight * parts + (2 * self.phase + 1) * self.left) // (self.left * parts)
        return whole * self.weight + added


@dataclass(frozen=True)
class _Stage:
    """A node's slots from `first_step` on; before it, the node took `before`, int64 [S, 1], of each source."""

    first_step: int
    before: Ints
    levels: tuple[_Level, ...]

    def taken(self, sequences: Ints) -> Ints:
        """Return how many sequences of each source were taken after `sequences` of the stage, int64 [S, J] from [J]."""
        counts = np.repeat(self.before, len(sequences), 1)
        for level in self.levels:
            of_source = level.of(sequences)
            counts[level.source] += of_source
            sequences = sequences - of_source
        return counts


def _levels(weights: Mapping[str, float], names: Sequence[str], nodes: int, node: int) -> Iterator[_Level]:
    shares = _shares(weights)
    # Heaviest first, equal ones by name: the order must not depend on that of the recipe.
    left, phase = sum(shares.values()), node
    for name in sorted(shares, key=lambda name: (-shares[name], name)):
        yield _Level(names.index(name), shares[name], left, phase, nodes)
        left -= shares[name]
        phase = phase * _GENERATOR % nodes


def _shares(weights: Mapping[str, float]) -> dict[str, int]:
    """Return the weights as integers in the same proportions; rounded if their sum would exceed 2^26."""
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    total = sum(exact.values(), Fraction(0))
    scale = Fraction(math.lcm(*(value.denominator for value in exact.values())))
    scale /= math.gcd(*(int(value * scale) for value in exact.values()))
    if total * scale > _MAX_TOTAL:
        scale = (_MAX_TOTAL - len(exact)) / total
    return {name: max(1, round(value * scale)) for name, value in exact.items()}


def check_epochs(data: DataRecipe, samples_per_shard: Mapping[str, Ints], global_batch_size: int, steps: int) -> None:
    """Raise ValueError if the steps would show sequences of a source more often than its `max_epochs`."""
    names = list(samples_per_shard)
    for number, source in enumerate(data.sources):
        ends = np.cumsum(samples_per_shard[source.name])
        if source.max_epochs is None or ends[-1] < global_batch_size:
            continue
        seen = functools.partial(_most_epochs, data, names, number, ends, global_batch_size)
        if (most := seen(steps)) > source.max_epochs:
            allowed = bisect.bisect_right(range(steps), source.max_epochs, key=seen) - 1
            raise ValueError(
                f"data.sources: {source.name} would be seen {most:.4g} times in train.steps={steps}, and its "
                f"max_epochs={source.max_epochs:g} are over after step {allowed}: lower its weight or the steps, or "
                "raise max_epochs"
            )


def _most_epochs(
    data: DataRecipe, names: Sequence[str], source: int, shard_ends: Ints, global_batch_size: int, steps: int
) -> float:
    """Return the largest number of epochs that any canonical node has seen of its part of a source."""
    return max(
        NodeMixture(data.mixture, names, global_batch_size, node).taken(steps)[source]
        / NodeOrder(shard_ends, global_batch_size, node, shuffle_window=None, seed=0).num_samples
        for node in range(len(node_slots(global_batch_size)) - 1)
    )


def source_usage(recipe: Recipe, manifest: Manifest) -> list[dict[str, Any]]:
    """Return what each stage of a run takes of each source, as JSON values: sequences, tokens and epochs."""
    data, batch = recipe.data, recipe.train.global_batch_size
    names, nodes = list(data.by_source), range(len(node_slots(batch)) - 1)
    mixed = [NodeMixture(data.mixture, names, batch, node) for node in nodes]
    sizes = np.array([split.sequences if (split := manifest.part(name).train) else 0 for name in names])
    stages, before, first_step = [], np.zeros(len(names), np.int64), 1
    for stage in data.mixed_before(recipe.train.steps):
        assert stage.until is not None
        taken = np.sum([mixture.taken(stage.until) for mixture in mixed], 0)
        of_sources = {}
        for source, name in enumerate(names):
            sequences, size = int(taken[source] - before[source]), max(1, int(sizes[source]))
            of_sources[name] = {
                "share": stage.weights.get(name, 0.0) / sum(stage.weights.values()),
                "sequences": sequences,
                "tokens": sequences * data.seq_len,
                "epochs": sequences / size,
                "epochs_so_far": int(taken[source]) / size,
            }
        stages.append({"first_step": first_step, "last_step": stage.until, "sources": of_sources})
        before, first_step = taken, stage.until + 1
    return stages


class MixtureOrder:
    """The order of a mixture for the slots `slots`, int64 [B], ascending.

    samples_per_shard: of every source, in the order of `DataRecipe.sources`. shuffle_window: None: no shuffling.
    """

    def __init__(
        self,
        data: DataRecipe,
        samples_per_shard: Mapping[str, Ints],
        global_batch_size: int,
        slots: Ints,
        *,
        shuffle_window: int | None,
        seed: int,
    ) -> None:
        names, bounds = list(samples_per_shard), node_slots(global_batch_size)
        ends = [np.cumsum(counts) for counts in samples_per_shard.values()]
        self._nodes = []
        for node, rows in nodes_of(slots, global_batch_size):
            orders = [
                NodeOrder(end, global_batch_size, node, shuffle_window=shuffle_window, seed=seed ^ source_key(name))
                for name, end in zip(names, ends, strict=True)
            ]
            own = slots[rows] - bounds[node]
            self._nodes.append((NodeMixture(data.mixture, names, global_batch_size, node), orders, own))

    def at(self, step: int) -> Sequences:
        """Return the sequences of the batch that follows `step` finished steps."""
        parts = [_sequences(*mixture.at(step, own), orders) for mixture, orders, own in self._nodes]
        return Sequences(*map(np.concatenate, zip(*parts, strict=True)))


def _sequences(sources: Ints, before: Ints, orders: Sequence[NodeOrder]) -> Sequences:
    epochs, ids = np.zeros_like(sources), np.zeros_like(sources)
    for source in np.unique(sources):
        rows = sources == source
        epochs[rows], places = np.divmod(before[rows], orders[source].num_samples)
        ids[rows] = np.concatenate(
            [orders[source].ids(int(epoch), places[epochs[rows] == epoch]) for epoch in np.unique(epochs[rows])]
        )
    return Sequences(sources, epochs, ids)
