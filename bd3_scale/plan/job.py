"""Describe one rank of a run whose step is to be traced."""

from __future__ import annotations

from dataclasses import dataclass

from bd3_scale.recipe.schema import ModelRecipe, Recipe
from bd3_scale.recipe.vocabulary import Vocabulary


@dataclass(frozen=True)
class Job:
    """One rank of a world, and what it runs.

    Attributes:
        recipe: with a precision other than `auto`.
        micro_batches: their number in a step.
        steps: their number; the last one is traced, since the first one allocates what later ones find allocated.
        beyond: whether the rank also evaluates, compares replicas and saves, for which there must be memory, too.
        whole: the model whose floating-point operations and parameters count, if the recipe's model has fewer layers.
    """

    recipe: Recipe
    vocabulary: Vocabulary
    rank: int
    world_size: int
    micro_batches: int
    steps: int = 2
    beyond: bool = False
    whole: ModelRecipe | None = None
