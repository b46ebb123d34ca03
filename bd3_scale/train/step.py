"""One optimiser step of a run, and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from bd3_scale.data.batch import Batch
from bd3_scale.objective import StepKeys
from bd3_scale.parallel.engine import StepResult, TrainingEngine
from bd3_scale.parallel.groups import local_device, placement
from bd3_scale.recipe.schema import OptimizerRecipe
from bd3_scale.resilience import faults
from bd3_scale.train.setup import Training


def take_step(training: Training) -> StepResult:
    """Noise, forward, backward and update of the next step, on the next batch of the stream."""
    recipe, run, batch, step = training.run.recipe, training.run, next(training.stream), training.state.step + 1
    faults.reach("step", step=step)
    keys = StepKeys(step - 1, recipe.seed, recipe.train.global_batch_size, training.state.intervals)
    micro_batches = [
        run.objective.training_inputs(micro, keys, placement(run.groups))
        for micro in batch.split(recipe.train.micro_batch_size)
    ]
    with _poisoned(training.engine, step):
        return training.engine.step(
            micro_batches,
            tokens=_trained_tokens(training, batch),
            lr=learning_rate(step - 1, recipe.train.steps, recipe.optimizer),
            kinds=len(recipe.diffusion.block_sizes_at(step - 1)),
        )


def learning_rate(step: int, steps: int, optimizer: OptimizerRecipe) -> float:
    """Learning rate of the update that follows `step` finished ones, of `steps` in all.

    Linear warm-up, then constant, a cosine to `min_lr_ratio` (Loshchilov & Hutter, 2017), or warm-up–stable–decay with
    a linear decay over the last `decay_steps` (Hu et al., 2024).
    """
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return optimizer.lr
    if optimizer.schedule == "cosine":
        progress = (step - optimizer.warmup_steps) / max(1, steps - optimizer.warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    else:
        decay_steps = steps // 5 if optimizer.decay_steps is None else optimizer.decay_steps
        share = min(1.0, max(0, steps - step) / max(1, decay_steps))
    return optimizer.lr * (optimizer.min_lr_ratio + (1 - optimizer.min_lr_ratio) * share)


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
