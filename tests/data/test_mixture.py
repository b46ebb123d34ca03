from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bd3_scale.data.mixture import MixtureOrder, NodeMixture, source_key
from bd3_scale.data.order import NodeOrder, node_slots
from bd3_scale.recipe.schema import DataRecipe

WEIGHTS = st.floats(0.001, 1).map(lambda weight: round(weight, 3))


def recipe(*stages: tuple[int | None, dict[str, float]]) -> DataRecipe:
    names = list(dict.fromkeys(name for _, weights in stages for name in weights))
    sources = [{"name": name, "path": name} for name in names]
    return DataRecipe.model_validate(
        {
            "seq_len": 8,
            "sources": sources,
            "stages": [{"until": until, "weights": weights} for until, weights in stages],
        }
    )


@st.composite
def mixtures(draw: st.DrawFn) -> DataRecipe:
    names = [f"source-{number}" for number in range(draw(st.integers(1, 10)))]
    ends = sorted(draw(st.sets(st.integers(1, 30), max_size=3)))
    weights = st.dictionaries(st.sampled_from(names), WEIGHTS, min_size=1)
    return recipe(*((end, draw(weights)) for end in [*ends, None]))


def counts_of_step(data: DataRecipe, batch: int, step: int, names: list[str]) -> np.ndarray:
    """Return the counts of all nodes from the source of each slot, int64 [nodes, S]."""
    bounds = node_slots(batch)
    found = []
    for node in range(len(bounds) - 1):
        own = np.arange(bounds[node + 1] - bounds[node])
        sources, _ = NodeMixture(data.mixture, names, batch, node).at(step, own)
        found.append(np.bincount(sources, minlength=len(names)))
    return np.array(found)


@given(mixtures(), st.sampled_from([1, 3, 8, 24, 64, 100, 130]))
def test_the_counts_are_those_of_the_slots(data, batch):
    """Compare the closed form with counting step by step."""
    names = list(data.by_source)
    mixed = [NodeMixture(data.mixture, names, batch, node) for node in range(len(node_slots(batch)) - 1)]
    taken = np.zeros((len(mixed), len(names)), np.int64)
    for step in range(35):
        assert [mixture.taken(step).tolist() for mixture in mixed] == taken.tolist()
        taken += counts_of_step(data, batch, step, names)


@given(mixtures(), st.sampled_from([1, 3, 8, 24, 64, 100]), st.data())
def test_each_sequence_of_a_source_is_the_next_one(data, batch, choose):
    """Check that nothing is skipped or repeated, for any stages, ranks and starting steps."""
    names = list(data.by_source)
    shards = {name: np.array([30 + 7 * number, 80]) for number, name in enumerate(names)}
    ranks = choose.draw(st.sampled_from([ranks for ranks in range(1, batch + 1) if batch % ranks == 0]))
    window = choose.draw(st.sampled_from([None, 64, 640]))
    slots = np.arange(batch)
    orders = [MixtureOrder(data, shards, batch, own, shuffle_window=window, seed=5) for own in slots.reshape(ranks, -1)]
    bounds = node_slots(batch)
    parts = [
        [
            NodeOrder(np.cumsum(counts), batch, node, shuffle_window=window, seed=5 ^ source_key(name))
            for name, counts in shards.items()
        ]
        for node in range(len(bounds) - 1)
    ]
    next_of = np.zeros((len(parts), len(names)), np.int64)
    for step in range(12):
        found = [np.concatenate(part) for part in zip(*(order.at(step) for order in orders), strict=True)]
        for slot, source, epoch, sample in zip(slots, *found, strict=True):
            node = int(np.searchsorted(bounds, slot, side="right")) - 1
            its_epoch, place = divmod(int(next_of[node, source]), parts[node][source].num_samples)
            next_of[node, source] += 1
            assert (epoch, sample) == (its_epoch, parts[node][source].ids(its_epoch, np.array([place]))[0])


@pytest.mark.parametrize(("sources", "most"), [(1, 0.01), (2, 0.51), (3, 3), (5, 6), (10, 9)])
@pytest.mark.parametrize("batch", [8, 64, 1024])
def test_every_step_is_near_its_quota(sources, most, batch):
    rng = np.random.default_rng(sources)
    for _ in range(6):
        weights = {f"s{n}": max(1e-3, round(float(w), 3)) for n, w in enumerate(rng.dirichlet(np.ones(sources)))}
        data, names = recipe((None, weights)), list(weights)
        share = np.array(
            [float(Fraction(str(w)) / sum(Fraction(str(v)) for v in weights.values())) for w in weights.values()]
        )
        mixed = [NodeMixture(data.mixture, names, batch, node) for node in range(min(64, batch))]
        for step in [*range(1, 60), 10**4, 10**6, 10**8 + 1]:
            taken = np.array([mixture.taken(step) for mixture in mixed])
            assert np.abs(taken - step * batch / len(mixed) * share).max() < 3
            assert np.abs(taken.sum(0) - step * batch * share).max() < most


def test_later_stages_change_nothing_of_what_was():
    early = recipe((20, {"web": 0.8, "code": 0.2}), (None, {"web": 1.0}))
    late = recipe((20, {"web": 0.8, "code": 0.2}), (25, {"math": 0.5, "web": 0.5}), (None, {"code": 1.0}))
    shards = {name: np.array([400, 400]) for name in ("web", "code", "math")}
    slots, found = np.arange(100), []
    for data in (early, late):
        own = {name: shards[name] for name in data.by_source}
        order = MixtureOrder(data, own, 100, slots, shuffle_window=640, seed=1)
        names = np.array(list(own))
        found.append([(names[f.sources].tolist(), f.epochs.tolist(), f.ids.tolist()) for f in map(order.at, range(22))])
    assert found[0][:20] == found[1][:20]
    assert found[0][20:] != found[1][20:]
    assert early.mixed_before(20) == late.mixed_before(20) != late.mixed_before(21) != early.mixed_before(21)
    assert early.mixed_before(7) == early.mixed_before(7)
