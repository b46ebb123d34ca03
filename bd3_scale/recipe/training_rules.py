"""Check the optimiser, its schedule and the checkpoints that are kept."""

from __future__ import annotations

import math
from collections.abc import Iterator

from bd3_scale.recipe.rules import rule
from bd3_scale.recipe.schema import Recipe
from bd3_scale.registry import optimizers


@rule("optimizer.warmup_steps", "train.steps")
def _warmup_fits(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that the warm-up is not longer than the training."""
    warmup, steps = recipe.optimizer.warmup_steps, recipe.train.steps
    if warmup > steps:
        yield f"optimizer.warmup_steps={warmup} exceeds train.steps={steps}: lower it or train longer"


@rule("optimizer.decay_steps", "optimizer.schedule", "optimizer.warmup_steps", "train.steps")
def _decay_fits(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that decay_steps belongs to the wsd schedule, and fits into train.steps after the warm-up."""
    optimizer, steps = recipe.optimizer, recipe.train.steps
    decay = optimizer.decay_steps
    if decay is not None and optimizer.schedule != "wsd":
        yield (
            f"optimizer.decay_steps={decay} belongs to the wsd schedule, not {optimizer.schedule}: "
            "set optimizer.schedule=wsd, or leave decay_steps out"
        )
    elif decay is not None and optimizer.warmup_steps + decay > steps:
        yield (
            f"optimizer.warmup_steps={optimizer.warmup_steps} and decay_steps={decay} together exceed "
            f"train.steps={steps}: lower them or train longer"
        )


@rule("optimizer.family", "optimizer.betas", "optimizer.eps", "optimizer.options")
def _family_takes_the_options(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that betas, eps and options are set only where the optimiser's family takes them."""
    yield from optimizers.get(recipe.optimizer.family)(recipe.optimizer).problems()


@rule("optimizer.groups")
def _groups_set_something(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that every group of tensors sets lr_scale or weight_decay."""
    for group in recipe.optimizer.groups:
        if not group.settings:
            yield f"optimizer.groups: {group.match!r} gives nothing: set lr_scale or weight_decay, or leave it out"


@rule("checkpoint.keep_best", "checkpoint.every_steps", "evaluation.every_steps", "train.steps")
def _best_checkpoints_are_evaluated(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that keep_best has checkpoints at steps that are evaluated."""
    saves, evaluates = recipe.checkpoint.every_steps, recipe.evaluation.every_steps
    if recipe.checkpoint.keep_best and not (saves and evaluates and math.lcm(saves, evaluates) <= recipe.train.steps):
        yield (
            f"checkpoint.keep_best={recipe.checkpoint.keep_best} needs checkpoints that are evaluated, and with "
            f"checkpoint.every_steps={saves} and evaluation.every_steps={evaluates} none is: make one a multiple of "
            "the other"
        )
