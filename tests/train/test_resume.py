"""What may change between the attempts of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from bd3_scale.checkpoint.manifest import CheckpointManifest
from bd3_scale.recipe.schema import Recipe
from bd3_scale.recipe.vocabulary import Vocabulary
from bd3_scale.train.resume import check_resumable
from tests.support.recipes import tiny_recipe


def recipe(search: bool, draws: int) -> Recipe:
    return Recipe.model_validate(
        tiny_recipe(diffusion={"search_interval": search}, evaluation={"every_steps": 2, "draws": draws})
    )


def test_evaluation_may_change_unless_training_follows_it() -> None:
    def resume(search: bool) -> None:
        manifest = CheckpointManifest(
            step=4,
            recipe=recipe(search, 1),
            recipe_hash="",
            vocabulary=Vocabulary(size=258, eos_id=256, mask_id=257),
            data_hash="h",
            world_size=1,
            states=(),
        )
        check_resumable(Path("c"), manifest, recipe(search, 2), "h")

    resume(search=False)
    with pytest.raises(ValueError, match=r"evaluation.draws is 2, the checkpoint has 1"):
        resume(search=True)
