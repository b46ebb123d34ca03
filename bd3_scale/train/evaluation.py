"""Evaluations in the course of a training, which may follow what they find."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bd3_scale.data.stream import held_out_batches
from bd3_scale.diffusion.interval import Interval, IntervalSearch
from bd3_scale.evaluate.nelbo import HeldOut, evaluate_nelbo
from bd3_scale.parallel.collective import on_rank_zero
from bd3_scale.train.setup import Training

Evaluated = tuple[Sequence[HeldOut], Sequence[IntervalSearch], Mapping[int, Interval]]


def evaluate(training: Training, step: int) -> Evaluated:
    """NELBO of held-out sequences at every block size in use, with the averaged weights where an average is kept.

    Where the recipe says so, the intervals follow what was found: it is returned with its searches and the intervals
    that training goes on with.
    """
    run, diffusion = training.run, training.run.recipe.diffusion
    with training.engine.zero.evaluation_weights():
        found = [
            _held_out(training, block_size)
            for block_size in dict.fromkeys((diffusion.block_size, *diffusion.block_sizes_at(step)))
        ]
    searches = [held_out.intervals() for held_out in found] if diffusion.search_interval else []
    default = (diffusion.mask_rate_low, diffusion.mask_rate_high)
    # Rank 0 decides: ranks of one model must mask alike, whatever their processors make of a last bit.
    followed = on_rank_zero(lambda: [list(s.follow(run.intervals.get(s.block_size, default))) for s in searches])
    run.intervals.update({s.block_size: (low, high) for s, (low, high) in zip(searches, followed, strict=True)})
    return found, searches, run.intervals


def _held_out(training: Training, block_size: int) -> HeldOut:
    recipe, groups = training.run.recipe, training.run.groups
    batches = held_out_batches(
        recipe.data,
        training.run.data,
        batch_size=recipe.train.micro_batch_size,
        dp_rank=groups.dp.rank(),
        dp_size=groups.dp.size(),
        sequences=recipe.evaluation.sequences,
    )
    return evaluate_nelbo(
        training.engine.chunks,
        batches,
        groups,
        objective=training.run.objective.at(block_size),
        draws=recipe.evaluation.draws,
    )
