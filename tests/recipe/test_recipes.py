"""The recipes that ship load, fit the nodes that their comments name, and have the size and memory stated there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bd3_scale.recipe.checks import check_recipe, data_parallel_size
from bd3_scale.recipe.load import load_recipe
from bd3_scale.recipe.schema import Recipe

RECIPES = Path(__file__).parents[2] / "recipes"
# An adaptation takes its model from what it adapts.
TRAININGS = sorted(path for path in RECIPES.glob("*.yaml") if not path.name.startswith("adapt-"))
MULTI_NODE = [path for path in TRAININGS if "# nodes:" in path.read_text()]


def stated(path: Path, what: str) -> str:
    return re.search(rf"^# {what}: (.+)$", path.read_text(), re.MULTILINE)[1]


def parameters(recipe: Recipe, vocabulary: int) -> int:
    model, hidden = recipe.model, recipe.model.hidden_size
    attention = 2 * hidden * model.head_size * (model.num_attention_heads + model.query_groups) + 2 * model.head_size
    layer = attention + 3 * hidden * model.ffn_hidden_size + 2 * hidden
    return model.num_layers * layer + hidden + vocabulary * hidden * (1 if model.tie_embeddings else 2)


@pytest.mark.parametrize("path", TRAININGS, ids=lambda path: path.stem)
def test_it_fits_its_ranks(path: Path) -> None:
    recipe = load_recipe(path)
    nodes, ranks = (
        map(int, stated(path, "nodes").split(" x ")) if path in MULTI_NODE else (1, recipe.parallel.model_size)
    )
    check_recipe(recipe, nodes * ranks)


@pytest.mark.parametrize("path", MULTI_NODE, ids=lambda path: path.stem)
def test_size_and_memory_are_those_of_the_comment(path: Path) -> None:
    recipe = load_recipe(path)
    nodes, ranks = map(int, stated(path, "nodes").split(" x "))
    count = parameters(recipe, int(stated(path, "vocabulary").split()[0]))
    assert float(stated(path, "parameters").split()[0]) * 1e9 == pytest.approx(count, rel=0.02)
    weights = 4 if recipe.train.precision == "fp32" else 2
    mine = count / recipe.parallel.tensor / recipe.parallel.pipeline
    held = mine * (weights + 4 + 16 / data_parallel_size(recipe, nodes * ranks))
    assert float(stated(path, "static memory").split()[0]) * 1e9 == pytest.approx(held, rel=0.05)


def test_there_are_sizes_for_several_nodes() -> None:
    assert {path.stem for path in MULTI_NODE} >= {"paper-110m", "paper-110m-cpu", "1b", "8b"}
