"""Check that the package's recipes load, fit the nodes in their comments, and have the size stated there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bd3_scale.recipe.checks import check_recipe
from bd3_scale.recipe.load import load_recipe, recipe_files
from bd3_scale.recipe.schema import Recipe

RECIPES = Path(__file__).parents[2] / "recipes"
# An adaptation takes its model from what it adapts.
TRAININGS = sorted(path for path in RECIPES.rglob("*.yaml") if not path.name.startswith("adapt-"))
MULTI_NODE = [path for path in TRAININGS if "# nodes:" in path.read_text()]


def stated(path: Path, what: str) -> str:
    """Return the value in a comment of the recipe, or of the recipe that it extends."""
    found = (re.search(rf"^# {what}: (.+)$", file.read_text(), re.MULTILINE) for file in recipe_files(path))
    return next(match[1] for match in found if match)


def parameters(recipe: Recipe, vocabulary: int) -> int:
    model, hidden = recipe.model, recipe.model.hidden_size
    attention = 2 * hidden * model.head_size * (model.num_attention_heads + model.query_groups) + 2 * model.head_size
    dense, sparse = model.dense_layers, model.num_layers - model.dense_layers
    mlps = dense * 3 * hidden * model.ffn_hidden_size
    if moe := model.moe:
        width = moe.num_experts * moe.ffn_hidden_size + moe.shared_ffn_hidden_size
        mlps += sparse * hidden * (moe.num_experts + 3 * width)
    layers = model.num_layers * (attention + 2 * hidden) + mlps
    return layers + hidden + vocabulary * hidden * (1 if model.tie_embeddings else 2)


def layouts(path: Path) -> list[tuple[int, list[str]]]:
    """Return ranks and values of each layout that a recipe's comments name."""
    found = re.findall(r"^# on (\d+) x (\d+)(?: with ([^:]+))?:", path.read_text(), re.MULTILINE)
    return [(int(nodes) * int(gpus), values.split()) for nodes, gpus, values in found]


@pytest.mark.parametrize("path", TRAININGS, ids=lambda path: path.stem)
def test_it_fits_its_ranks(path: Path) -> None:
    recipe = load_recipe(path)
    nodes, ranks = (
        map(int, stated(path, "nodes").split(" x ")) if path in MULTI_NODE else (1, recipe.parallel.fewest_ranks)
    )
    check_recipe(recipe, nodes * ranks)
    for gpus, values in layouts(path):
        check_recipe(load_recipe(path, values), gpus)


@pytest.mark.parametrize("path", TRAININGS, ids=lambda path: path.stem)
def test_its_size_is_that_of_the_comment(path: Path) -> None:
    count = parameters(load_recipe(path), int(stated(path, "vocabulary").split()[0]))
    size, unit = stated(path, "parameters").split()
    assert float(size) * {"M": 1e6, "B": 1e9}[unit] == pytest.approx(count, rel=0.05 if unit == "M" else 0.02)


@pytest.mark.parametrize("path", [path for path in MULTI_NODE if layouts(path)], ids=lambda path: path.stem)
def test_the_nodes_of_the_comment_are_those_of_the_layout_below(path: Path) -> None:
    (gpus, values), *_ = layouts(path)
    nodes, ranks = map(int, stated(path, "nodes").split(" x "))
    assert (gpus, values) == (nodes * ranks, [])


def test_there_are_sizes_for_several_nodes() -> None:
    assert {path.stem for path in MULTI_NODE} >= {
        *("paper-110m", "paper-110m-cpu", "1b", "3b", "8b", "32b"),
        *("16b-a1b", "30b-a3b"),
    }
    ranks = {gpus for path in MULTI_NODE for gpus, _ in layouts(path)}
    assert {min(ranks), max(ranks)} == {8, 512}
