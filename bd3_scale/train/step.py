"""Take one optimiser step of a run; compute its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bd3_scale.model.rows import ModelInputs
from bd3_scale.parallel.engine import StepResult, TrainingEngine
from bd3_scale.parallel.groups import local_device
from bd3_scale.recipe.schema import OptimizerRecipe, Recipe
from bd3_scale.resilience import faults
from bd3_scale.train.setup import Training


def take_step(training: Training) -> StepResult:
    """Take the next step, on the next batch of the stream; the host makes the inputs of the one after it meanwhile."""
    recipe, inputs, step = training.run.recipe, training.inputs, training.state.step + 1
    micro_batches = inputs.take()
    faults.reach("step", step=step)
    tokens = _trained_tokens(training, micro_batches)
    with _poisoned(training.engine, step):
        return train_on(training.engine, recipe, micro_batches, step=step, tokens=tokens, meanwhile=inputs.make_ahead)


def train_on(
    engine: TrainingEngine,
    recipe: Recipe,
    micro_batches: Sequence[ModelInputs],
    *,
    step: int,
    tokens: int,
    meanwhile: Callable[[], None] = lambda: None,
) -> StepResult:
    """Take step `step` of a recipe, counted from 1, on given inputs; see `TrainingEngine.step`."""
    return engine.step(
        micro_batches,
        tokens=tokens,
        lr=learning_rate(step - 1, recipe.train.steps, recipe.optimizer),
        num_groups=len(recipe.diffusion.block_sizes_at(step - 1)) * len(recipe.data.by_source),
        meanwhile=meanwhile,
    )


def learning_rate(step: int, steps: int, optimizer: OptimizerRecipe) -> float:
    """Return the learning rate of the update that follows `step` finished ones, of `steps` in all.

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


def _trained_tokens(training: Training, micro_batches: Sequence[ModelInputs]) -> int:
    """Count the tokens of the global batch that are trained on: all but those shown as context (collective)."""
    recipe, groups = training.run.recipe, training.run.groups
    if not training.run.data.shows_tokens:
        return recipe.train.global_batch_size * recipe.data.seq_len
    mine = sum(sum(inputs.trained_tokens) for inputs in micro_batches)
    count = torch.full((), mine, device=local_device())
    dist.all_reduce(count, group=groups.dp_cp)
    # A batch without such a token has no loss; its divisor must not be 0.
    return max(1, int(count))


@contextmanager
def _poisoned(engine: TrainingEngine, step: int) -> Iterator[None]:
    """Make a gradient of this rank NaN inside the block, if a fault was injected for this step."""
    if not faults.is_poisoned(step):
        yield
        return
    parameter: Any = next(engine.chunks[0].parameters())

    def poison(gradient: Tensor | None) -> Tensor | None:
        if gradient is not None:
            return gradient * math.nan
        # Autograd passes none if the function of the weight has added the gradient to the sum itself.
        parameter.main_grad.fill_(math.nan)
        return None

    handle = parameter.register_hook(poison)
    yield
    handle.remove()
