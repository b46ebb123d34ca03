"""Evaluations in the course of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bd3_scale.data.stream import held_out_batches
from bd3_scale.diffusion.interval import Interval, IntervalSearch
from bd3_scale.diffusion.nelbo import NelboEstimate
from bd3_scale.evaluate.nelbo import HeldOut, evaluate_nelbo
from bd3_scale.parallel.collective import on_rank_zero
from bd3_scale.train.inputs import waited_for
from bd3_scale.train.setup import Training


@dataclass(frozen=True)
class Evaluation:
    """What held-out sequences say at every block size in use, the recipe's first.

    by_source: those of each source at that one; empty where there is one alone. searches: of the mask-rate interval,
    where the recipe asks for it; intervals: what training is to go on with.
    """

    held_out: Sequence[HeldOut]
    searches: Sequence[IntervalSearch]
    intervals: Mapping[int, Interval]
    by_source: Mapping[str, NelboEstimate]


def evaluate(training: Training) -> Evaluation:
    """Return the NELBO of held-out sequences, with the averaged weights where an average is kept (collective).

    Nothing of the training changes: whether it follows the intervals that were found is its own affair.
    """
    state, diffusion = training.state, training.run.recipe.diffusion
    with training.engine.zero.evaluation_weights():
        sizes = dict.fromkeys((diffusion.block_size, *diffusion.block_sizes_at(state.step)))
        of_sources = [_held_out(training, block_size) for block_size in sizes]
    found = [HeldOut.merged(list(parts.values())) for parts in of_sources]
    by_source = {name: held_out.nelbo for name, held_out in of_sources[0].items()} if len(of_sources[0]) > 1 else {}
    searches = [held_out.intervals() for held_out in found] if diffusion.search_interval else []
    default = (diffusion.mask_rate_low, diffusion.mask_rate_high)
    # Rank 0 decides: ranks of one model must mask alike, whatever their processors make of a last bit.
    followed = on_rank_zero(lambda: [list(s.follow(state.intervals.get(s.block_size, default))) for s in searches])
    new = {search.block_size: (low, high) for search, (low, high) in zip(searches, followed, strict=True)}
    return Evaluation(found, searches, {**state.intervals, **new}, by_source)


def _held_out(training: Training, block_size: int) -> dict[str, HeldOut]:
    """Return what each source's held-out sequences say, of those that have some."""
    run, groups = training.run, training.run.groups
    recipe = run.recipe
    found = {}
    for name, data in recipe.data.by_source.items():
        if (manifest := run.data.part(name)).validation is None:
            continue
        batches = held_out_batches(
            data,
            manifest,
            batch_size=recipe.train.micro_batch_size,
            dp_rank=groups.dp.rank(),
            dp_size=groups.dp.size(),
            sequences=recipe.evaluation.sequences,
        )
        batches = run.pipeline.shared(waited_for(batches, run.heartbeat))
        objective = run.objective.at(block_size)
        draws = recipe.evaluation.draws
        found[name] = evaluate_nelbo(training.engine.chunks, batches, groups, objective=objective, draws=draws)
    return found
