"""Evaluate the model during a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bd3_scale.data.stream import held_out_batches
from bd3_scale.diffusion.interval import Interval, IntervalSearch
from bd3_scale.diffusion.nelbo import NelboEstimate
from bd3_scale.evaluate.nelbo import HeldOut, evaluate_nelbo
from bd3_scale.parallel.collective import on_rank_zero
from bd3_scale.train.inputs import with_heartbeat
from bd3_scale.train.samples import write_samples
from bd3_scale.train.setup import Training


@dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation on held-out sequences.

    held_out: for each block size in use, that of the recipe first. searches: of the mask-rate interval, by block size,
    if the recipe has `search_interval`. intervals: the mask rates that training continues with. by_source: the NELBO of
    each source at the first block size; empty if there is one source. samples: the texts of `evaluation.prompts`.
    """

    held_out: Sequence[HeldOut]
    searches: Sequence[IntervalSearch]
    intervals: Mapping[int, Interval]
    by_source: Mapping[str, NelboEstimate]
    samples: Sequence[Mapping[str, Any]] = ()


def evaluate(training: Training, *, samples: bool = False) -> Evaluation:
    """Evaluate held-out sequences, with the averaged weights if an average is kept (collective).

    The state of the training does not change; the caller decides whether it takes the new intervals.

    samples: write the texts of `evaluation.prompts` as well.
    """
    state, diffusion = training.state, training.run.recipe.diffusion
    with training.engine.zero.evaluation_weights():
        sizes = dict.fromkeys((diffusion.block_size, *diffusion.block_sizes_at(state.step)))
        of_sources = [_held_out(training, block_size) for block_size in sizes]
        texts = write_samples(training) if samples else []
    held_out = [HeldOut.merged(list(parts.values())) for parts in of_sources]
    by_source = {name: one.nelbo for name, one in of_sources[0].items()} if len(of_sources[0]) > 1 else {}
    searches = [one.intervals() for one in held_out] if diffusion.search_interval else []
    default = (diffusion.mask_rate_low, diffusion.mask_rate_high)
    # Rank 0 decides: all ranks must draw the same masks, and their processors may round a last bit otherwise.
    followed = on_rank_zero(lambda: [list(s.follow(state.intervals.get(s.block_size, default))) for s in searches])
    new = {search.block_size: (low, high) for search, (low, high) in zip(searches, followed, strict=True)}
    return Evaluation(held_out, searches, {**state.intervals, **new}, by_source, texts)


def _held_out(training: Training, block_size: int) -> dict[str, HeldOut]:
    """Evaluate each source that has held-out sequences."""
    run, groups = training.run, training.run.groups
    recipe = run.recipe
    results = {}
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
        batches = run.pipeline.shared(with_heartbeat(batches, run.heartbeat))
        objective = run.objective.at(block_size)
        draws = recipe.evaluation.draws
        results[name] = evaluate_nelbo(training.engine.chunks, batches, groups, objective=objective, draws=draws)
    return results
