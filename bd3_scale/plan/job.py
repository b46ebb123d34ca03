"""One rank of a run whose step is to be traced."""

from __future__ import annotations

from dataclasses import dataclass

from bd3_scale.recipe.schema import ModelRecipe, Recipe
from bd3_scale.recipe.vocabulary import Vocabulary


@dataclass(frozen=True)
class Job:
    """One rank of a world, and what of a run it does.

    Attributes:
        recipe: with a precision that is not `auto`.
        micro_batches: of a step.
        steps: of which the last is traced; the first one makes what later ones have.
        beyond: whether it evaluates, compares replicas and saves, too, which its memory must allow.
        whole: the model whose floating-point operations and parameters count, where the recipe's has fewer layers.
    """

    recipe: Recipe
    vocabulary: Vocabulary
    rank: int
    world_size: int
    micro_batches: int
    steps: int = 2
    beyond: bool = False
    whole: ModelRecipe | None = None
