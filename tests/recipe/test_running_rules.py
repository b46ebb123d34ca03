"""Check what a recipe may set for what a run shows: profiles, prompts, loggers."""

from __future__ import annotations

import pytest

from bd3_scale.recipe.checks import check_recipe
from bd3_scale.recipe.schema import Recipe, RecipeError
from tests.support.recipes import tiny_recipe

PROMPTS = {"evaluation": {"prompts": ["Once"]}}
LATER = "bd3-scale generate RUN --prompt"


def problems(world_size: int, **sections: object) -> tuple[str, ...]:
    try:
        check_recipe(Recipe.model_validate(tiny_recipe(**sections)), world_size)
    except RecipeError as error:
        return error.problems
    return ()


@pytest.mark.parametrize(
    ("sections", "world_size", "words"),
    [
        ({"train": {"profile": {"steps": [10, 13]}}}, 1, ["train.profile.steps=[10, 13]", "steps 1 to 12"]),
        ({"train": {"profile": {"steps": [4, 3]}}}, 1, ["train.profile.steps=[4, 3]", "first and the last step"]),
        ({"train": {"profile": {"steps": [3, 4], "ranks": [0, 2]}}}, 2, ["[2] are no ranks", "0 to 1"]),
        ({**PROMPTS, "parallel": {"pipeline": 2}}, 2, ["parallel.pipeline up to 1", "it is 2", LATER]),
        ({**PROMPTS, "parallel": {"tensor": 2, "sequence": True}}, 2, ["parallel.sequence=false", "it is true", LATER]),
        ({**PROMPTS, "parallel": {"zero_stage": 3}}, 2, ["parallel.zero_stage up to 2", "it is 3", LATER]),
        (
            {**PROMPTS, "diffusion": {"block_size": 1, "objective": "next_token", "mask_rate_low": 0.0}},
            1,
            ["next_token trains none", LATER],
        ),
    ],
)
def test_what_a_run_cannot_show_is_refused_with_the_way_out(
    sections: dict[str, object], world_size: int, words: list[str]
) -> None:
    found = [problem for problem in problems(world_size, **sections) if "prompts" in problem or "profile" in problem]
    assert len(found) == 1, found
    assert [word for word in words if word not in found[0]] == []


@pytest.mark.parametrize(
    ("sections", "world_size"),
    [
        ({"train": {"profile": {"steps": [12, 12], "memory": True, "ranks": [1]}}}, 2),
        ({**PROMPTS, "parallel": {"tensor": 2, "zero_stage": 2}}, 4),
        ({**PROMPTS, "parallel": {"context": 2}}, 2),
    ],
)
def test_what_it_can_show_passes(sections: dict[str, object], world_size: int) -> None:
    assert problems(world_size, **sections) == ()
