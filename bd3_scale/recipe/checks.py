"""Check a recipe: its names, then every registered rule; and derive the number of ranks to start.

The rules are in the modules `*_rules`; see `rules` for how one is added.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from operator import attrgetter
from typing import Any

# Importing the modules of rules registers them.
from bd3_scale.recipe import data_rules as data_rules
from bd3_scale.recipe import model_rules as model_rules
from bd3_scale.recipe import moe_rules as moe_rules
from bd3_scale.recipe import running_rules as running_rules
from bd3_scale.recipe import training_rules as training_rules
from bd3_scale.recipe.diffusion_rules import check_block_size as check_block_size
from bd3_scale.recipe.parallel_rules import batches_divide
from bd3_scale.recipe.parallel_rules import data_parallel_size as data_parallel_size
from bd3_scale.recipe.rules import DATA_RULES as DATA_RULES
from bd3_scale.recipe.rules import RULES as RULES
from bd3_scale.recipe.rules import in_order
from bd3_scale.recipe.schema import Recipe, RecipeError
from bd3_scale.registry import Registry, attention_backends, loggers, objectives, optimizers, schedules

# Keys whose value is a name in a registry, and the name that is allowed besides.
_NAMES: tuple[tuple[str, Registry[Any], str], ...] = (
    ("diffusion.objective", objectives, ""),
    ("diffusion.noise_schedule", schedules, ""),
    ("attention_backend", attention_backends, "auto"),
    ("optimizer.family", optimizers, ""),
)


def world_size_for_launch(recipe: Recipe) -> int:
    """Return the processes to start here: `launch.processes`, else one a GPU, else the fewest the layout needs."""
    if recipe.launch.processes is not None:
        return recipe.launch.processes
    return _gpus() or recipe.parallel.fewest_ranks


def _gpus() -> int:
    """Return the GPUs of this machine. A build of PyTorch for CPUs sees none, and importing it would take a second."""
    if version("torch").endswith("+cpu"):
        return 0
    import torch

    return torch.cuda.device_count()


def check_recipe(recipe: Recipe, world_size: int) -> None:
    """Check the names of a recipe and the rules that join several of its keys, before its data are opened.

    Its plug-ins must be imported before. world_size: ranks of the run, on all nodes.

    Raises:
        RecipeError: all unknown names and broken rules, each with its values and what to change.
    """
    # The rules look up what has these names.
    if problems := list(_name_problems(recipe)):
        raise RecipeError(problems)
    # A rule may say the same of several block sizes: say it once.
    problems = list(dict.fromkeys(problem for rule in in_order(RULES) for problem in rule.problems(recipe, world_size)))
    if problems:
        raise RecipeError(problems)


def check_against_data(recipe: Recipe, world_size: int, document_multiple: int) -> None:
    """Check what a recipe that `check_recipe` has passed still depends on: the number of ranks, and the prepared data.

    document_multiple: tokens to a multiple of which the prepared documents were padded (from the data's manifest).

    Raises:
        RecipeError: as in `check_recipe`.
    """
    problems = list(batches_divide(recipe, world_size))
    problems += [problem for rule in DATA_RULES for problem in rule.problems(recipe, document_multiple)]
    if problems:
        raise RecipeError(problems)


def _name_problems(recipe: Recipe) -> Iterator[str]:
    named = [(key, registry, attrgetter(key)(recipe), besides) for key, registry, besides in _NAMES]
    named += [("logging.loggers", loggers, name, "") for name in recipe.logging.loggers]
    for key, registry, name, besides in named:
        if name == besides:
            continue
        try:
            registry.get(name)
        except ValueError as error:
            yield f"{key}={name}: {error}"
