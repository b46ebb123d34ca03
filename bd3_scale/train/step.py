"""One optimiser step of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from bd3_scale.data.batch import Batch
from bd3_scale.parallel.engine import StepResult, TrainingEngine
from bd3_scale.parallel.groups import local_device, placement
from bd3_scale.resilience import faults
from bd3_scale.train.learning_rate import learning_rate
from bd3_scale.train.setup import Training


def take_step(training: Training, step: int) -> StepResult:
    """Noise, forward, backward and update of step `step`, counted from 1, on the next batch of the stream."""
    recipe, run, batch = training.run.recipe, training.run, next(training.stream)
    faults.reach("step", step=step)
    micro_batches = [
        run.objective.training_inputs(
            micro,
            step - 1,
            seed=recipe.seed,
            global_batch_size=recipe.train.global_batch_size,
            intervals=run.intervals,
            place=placement(run.groups),
        )
        for micro in batch.split(recipe.train.micro_batch_size)
    ]
    with _poisoned(training.engine, step):
        return training.engine.step(
            micro_batches,
            tokens=_trained_tokens(training, batch),
            lr=learning_rate(step - 1, recipe.train.steps, recipe.optimizer),
            kinds=len(recipe.diffusion.block_sizes_at(step - 1)),
        )


def _trained_tokens(training: Training, batch: Batch) -> int:
    """Of the global batch, all but those that are shown; ranks tell each other where there are any (collective)."""
    recipe, groups = training.run.recipe, training.run.groups
    if not training.run.data.shows_tokens:
        return recipe.train.global_batch_size * recipe.data.seq_len
    count = (~batch.shown).sum().to(local_device())
    dist.all_reduce(count, group=groups.dp)
    # Of a batch without one there is no loss either.
    return max(1, int(count))


@contextmanager
def _poisoned(engine: TrainingEngine, step: int) -> Iterator[None]:
    """A gradient of this rank is NaN inside, where that was asked for."""
    if not faults.is_poisoned(step):
        yield
        return
    handle = next(engine.chunks[0].parameters()).register_hook(lambda gradient: gradient * math.nan)
    yield
    handle.remove()
