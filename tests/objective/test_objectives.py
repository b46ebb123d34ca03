"""Check the type of an objective: its options, and what a recipe may set."""

from __future__ import annotations

import subprocess
import sys
from typing import ClassVar

import pytest

from bd3_scale.objective import BlockDiffusion, NextToken, Objective, objective_of, objectives
from bd3_scale.recipe.checks import check_recipe
from bd3_scale.recipe.schema import DiffusionRecipe, Recipe, RecipeError
from bd3_scale.recipe.vocabulary import Vocabulary
from tests.support.recipes import tiny_recipe

VOCABULARY = Vocabulary(size=258, eos_id=256, mask_id=257)


@objectives.register("test-focal")
class Focal(BlockDiffusion):
    options: ClassVar = {"gamma": 2.0, "name": "x"}


def recipe(**diffusion) -> Recipe:
    return Recipe.model_validate(tiny_recipe(diffusion=diffusion))


def test_options_have_defaults_and_values():
    objective = objective_of(DiffusionRecipe(block_size=4, objective="test-focal"), VOCABULARY)
    assert objective.options == {"gamma": 2.0, "name": "x"}
    given = recipe(objective="test-focal", objective_options={"gamma": 1}).diffusion
    assert objective_of(given, VOCABULARY).options == {"gamma": 1, "name": "x"}
    assert objective_of(given, VOCABULARY).at(16).options["gamma"] == 1


@pytest.mark.parametrize(
    ("objective", "options", "words"),
    [
        ("test-focal", {"gama": 1}, "objective_options.gama: is not an option of test-focal: it takes gamma, name"),
        ("test-focal", {"gamma": "a"}, "objective_options.gamma: must be a value such as 2.0, not 'a'"),
        ("test-focal", {"name": 1}, "objective_options.name: must be a value such as 'x', not 1"),
        (
            "block_diffusion",
            {"gamma": 1},
            "objective_options.gamma: is not an option of block_diffusion: it takes none",
        ),
    ],
)
def test_options_that_do_not_suit_are_refused(objective, options, words):
    with pytest.raises(RecipeError) as told:
        check_recipe(recipe(objective=objective, objective_options=options), 1)
    assert words in str(told.value)


def test_every_objective_says_what_its_models_may_become():
    formats = ("sdar", "bd3", "qwen3", "qwen2", "llama")
    possible = {
        name: [f for f in formats if objectives.get(name).export_obstacle(f) is None]
        for name in ("block_diffusion", "score_entropy", "next_token")
    }
    assert possible["block_diffusion"] == possible["score_entropy"] == ["sdar", "bd3"]
    assert possible["next_token"] == ["qwen3", "qwen2", "llama"]
    assert not NextToken.fills_masks


def test_what_is_exact():
    def exact(name, block_size):
        return objective_of(DiffusionRecipe(block_size=block_size, objective=name), VOCABULARY).is_exact

    assert exact("block_diffusion", 1)
    assert exact("next_token", 1)
    assert not exact("block_diffusion", 4)
    assert not exact("score_entropy", 1), "scores that need not sum to 1 bound it alone"


def test_the_rules_of_a_recipe_are_read_without_pytorch():
    source = "import sys, bd3_scale.objective; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", source], check=True, timeout=100)


def test_an_objective_must_say_what_it_computes():
    with pytest.raises(TypeError, match="abstract"):
        Objective(DiffusionRecipe(block_size=4), VOCABULARY)
