"""One rank of a run whose step is to be traced."""

from __future__ import annotations

from dataclasses import dataclass

from bd3_scale.recipe.schema import Recipe
from bd3_scale.recipe.vocabulary import Vocabulary


@dataclass(frozen=True)
class Job:
    """One rank of a world, and what of a run it does.

    Attributes:
        recipe: with a precision that is not `auto`.
        micro_batches: of a step.
        beyond: whether it evaluates, compares replicas and saves, too.
    """

    recipe: Recipe
    vocabulary: Vocabulary
    rank: int
    world_size: int
    micro_batches: int
    beyond: bool = False
