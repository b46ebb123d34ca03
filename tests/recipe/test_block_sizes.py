"""Check block sizes that change during training: what each step trains with, and which recipes are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bd3_scale.recipe.checks import check_against_data, check_recipe
from bd3_scale.recipe.schema import DiffusionRecipe, ParallelRecipe, Recipe, RecipeError
from tests.support.recipes import tiny_recipe

phases = st.lists(st.tuples(st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 5)), max_size=5)


@given(phases, st.sampled_from([1, 4, 32]))
def test_every_step_has_the_block_size_of_its_phase(schedule: list[tuple[int, int]], last: int) -> None:
    diffusion = DiffusionRecipe.model_validate(
        {"block_size": last, "block_size_schedule": [{"block_size": b, "steps": n} for b, n in schedule]}
    )
    expected = [(size,) for size, steps in schedule for _ in range(steps)] + [(last,)] * 3
    assert [diffusion.block_sizes_at(step) for step in range(len(expected))] == expected
    assert set(diffusion.block_sizes) == {size for (size,) in expected}
    several = diffusion.model_copy(update={"block_size_choices": (2, 64)})
    assert [several.block_sizes_at(step) for step in range(len(expected))] == expected[:-3] + [(2, 64)] * 3
    assert set(several.block_sizes) == {*diffusion.block_sizes, 2, 64}
    assert len(set(several.block_sizes)) == len(several.block_sizes)


def test_noise_on_the_mask_falls_to_zero() -> None:
    diffusion = DiffusionRecipe(block_size=4, mask_noise_std=0.5, mask_noise_steps=4)
    assert [diffusion.mask_noise_at(step) for step in range(6)] == [0.5, 0.375, 0.25, 0.125, 0.0, 0.0]
    assert DiffusionRecipe(block_size=4).mask_noise_at(0) == 0.0


WHOLE = {"mask_rate_low": 0.0, "mask_rate_high": 1.0}


def recipe(steps: int = 20, **diffusion: object) -> Recipe:
    return Recipe.model_validate(
        tiny_recipe(diffusion=WHOLE | diffusion, train={"steps": steps, "global_batch_size": 2, "micro_batch_size": 1})
    )


UP = [{"block_size": 1, "steps": 5}, {"block_size": 16, "steps": 10}]


def check(recipe: Recipe, world_size: int = 1, document_multiple: int = 32) -> None:
    check_recipe(recipe, world_size)
    check_against_data(recipe, world_size, document_multiple)


def test_a_sound_schedule_passes() -> None:
    check(recipe(block_size_schedule=UP))
    check(recipe(block_size=1, objective="next_token"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block_size_schedule": UP, "steps": 15}, "takes 15 steps of train.steps=15, and none would be left for"),
        ({"block_size_schedule": [{"block_size": 24, "steps": 1}]}, "blocks of diffusion.block_size=24"),
        (
            {"block_size_schedule": [{"block_size": 64, "steps": 1}]},
            "block_size=64 does not divide document_multiple=32",
        ),
        (
            {"block_size_schedule": [{"block_size": 64, "steps": 1}], "noisy_copies": 2},
            "share one clean stream, and block_size=64 of seq_len=64 has none",
        ),
        ({"mask_noise_std": 0.1}, "mask_noise_std=0.1 and mask_noise_steps=0 belong together"),
        ({"block_size_choices": [4, 4]}, r"block_size_choices=\[4, 4\] has one twice"),
        ({"noise_steps": 100_001}, "float32 does not resolve"),
        ({"clip_masked_share": True}, "which all are: narrow the interval"),
        ({"loss_weights": "unit_when_heavy"}, "changes nothing at diffusion.mask_rate_low=0.0"),
        ({"search_interval": True}, "evaluation.every_steps=0: set it"),
        ({"search_interval": True, "block_size": 1, "noisy_copies": 2}, "noisy_copies=2 are equal"),
        ({"search_interval": True, "loss_weights": "unit_when_heavy"}, "searches for the plain loss"),
        ({"search_interval": True, "noise_schedule": "cosine"}, "leave the interval at 0 to 1 and search_interval out"),
        ({"objective": "next_token"}, "objective=next_token masks nothing: set diffusion.block_size=1"),
        ({"objective": "next_token", "block_size": 1, "noisy_copies": 2}, "leave noisy_copies out"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        check(recipe(**changes))


def test_a_problem_of_several_block_sizes_is_named_once() -> None:
    schedule = [{"block_size": 64, "steps": 1}, {"block_size": 16, "steps": 1}, {"block_size": 64, "steps": 1}]
    with pytest.raises(RecipeError) as caught:
        check(recipe(block_size_schedule=schedule))
    assert len(caught.value.problems) == 1


def test_context_ranks_cannot_cut_a_sequence_that_is_one_block_beside_smaller_ones() -> None:
    """Check that one block alone may be cut, since its noisy keys are gathered; beside clean rows they are not."""
    parallel = ParallelRecipe(context=2)
    alone = recipe(block_size=64).model_copy(update={"parallel": parallel})
    check(alone, 2, 64)
    mixed = recipe(block_size=8, block_size_choices=[8, 64]).model_copy(update={"parallel": parallel})
    with pytest.raises(RecipeError, match=r"does not divide into 2 ranges of whole blocks of diffusion.block_size=64"):
        check(mixed, 2, 64)
