"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math

from bd3_scale.recipe.schema import OptimizerRecipe


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
