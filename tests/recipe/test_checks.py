from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bd3_scale.recipe.checks import check_recipe, data_parallel_size, world_size_for_launch
from bd3_scale.recipe.schema import Recipe, RecipeError


def recipe(**changes: object) -> Recipe:
    """A recipe that breaks no rule; changes are dotted keys with `__` for the dot."""
    values: dict = {
        "name": "r",
        "model": {
            "num_layers": 2,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "ffn_hidden_size": 96,
        },
        "diffusion": {"block_size": 8},
        "data": {"path": "d", "seq_len": 64},
        "optimizer": {},
        "train": {"steps": 10, "global_batch_size": 8, "micro_batch_size": 2},
        "parallel": {},
        "launch": {},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values[section][name] = value
    return Recipe.model_validate(values)


def problems(r: Recipe, world_size: int = 1, document_multiple: int | None = 32) -> tuple[str, ...]:
    try:
        check_recipe(r, world_size, document_multiple)
    except RecipeError as error:
        return error.problems
    return ()


def test_a_sound_recipe_passes_at_every_layout_that_fits() -> None:
    for world_size in (1, 2, 4):
        for tensor in (1, 2):
            if world_size % tensor == 0:
                assert problems(recipe(parallel__tensor=tensor), world_size) == ()


@pytest.mark.parametrize(
    ("changes", "world_size", "words"),
    [
        ({"model__num_query_groups": 3}, 1, ["num_attention_heads=4", "num_query_groups=3", "2 or 4"]),
        (
            {"model__num_attention_heads": 3, "model__num_query_groups": 3},
            1,
            ["hidden_size=64", "63 or 66", "head_dim"],
        ),
        ({"model__head_dim": 15}, 1, ["15", "14 or 16"]),
        ({"model__norm_bias": True}, 1, ["norm_bias", "layernorm"]),
        ({"parallel__tensor": 4}, 4, ["num_query_groups=2", "tensor=4", "num_query_groups 4"]),
        ({"parallel__tensor": 2, "model__ffn_hidden_size": 97}, 2, ["ffn_hidden_size=97", "96 or 98"]),
        ({"parallel__tensor": 2}, 3, ["3 processes", "2 or 4"]),
        ({"parallel__tensor": 2}, 1, ["1 processes", "start 2"]),
        (
            {"train__global_batch_size": 9},
            2,
            ["global_batch_size=9", "micro_batch_size=2", "2 data-parallel", "8 or 12"],
        ),
        ({"train__global_batch_size": 1}, 1, ["global batch of 2"]),
        ({"diffusion__mask_rate_low": 0.8, "diffusion__mask_rate_high": 0.3}, 1, ["0.8", "0.3", "swap"]),
        ({"diffusion__mask_rate_low": 0.5, "diffusion__mask_rate_high": 0.5}, 1, ["0.5", "widen"]),
        ({"diffusion__mask_rate_low": 1.0}, 1, ["block_size=8", "one token"]),
        ({"diffusion__mask_rate_low": 0.5, "diffusion__mask_rate_high": 0.5, "diffusion__block_size": 1}, 1, ["widen"]),
        ({"diffusion__block_size": 24}, 1, ["seq_len=64", "block_size=24", "16 or 32"]),
        ({"diffusion__block_size": 128}, 1, ["seq_len=64", "take block_size 64"]),
        (
            {"diffusion__block_size": 64},
            1,
            ["document_multiple=32", "--document-multiple 64", "isolate_documents=false"],
        ),
        ({"data__cache_limit": "1gb"}, 1, ["cache_limit=1gb", "data.remote"]),
        ({"optimizer__warmup_steps": 11}, 1, ["warmup_steps=11", "steps=10"]),
        ({"optimizer__decay_steps": 2}, 1, ["decay_steps=2", "wsd", "cosine"]),
        (
            {"optimizer__decay_steps": 8, "optimizer__schedule": "wsd", "optimizer__warmup_steps": 3},
            1,
            ["warmup_steps=3", "decay_steps=8", "steps=10"],
        ),
    ],
)
def test_each_rule_names_value_rule_and_fix(changes: dict[str, object], world_size: int, words: list[str]) -> None:
    found = problems(recipe(**changes), world_size)
    assert len(found) == 1, found
    assert [word for word in words if word not in found[0]] == []


@pytest.mark.parametrize(
    ("changes", "document_multiple"),
    [
        ({"diffusion__mask_rate_low": 1.0, "diffusion__block_size": 1}, 32),
        ({"diffusion__block_size": 64}, None),
        ({"diffusion__block_size": 64}, 64),
        ({"diffusion__block_size": 64, "data__isolate_documents": False}, 32),
        ({"model__norm_bias": True, "model__normalization": "layernorm"}, 32),
        ({"model__head_dim": 10}, 32),
        ({"model__head_bias": True, "model__tie_embeddings": True}, 32),
        ({"data__cache_limit": "1.5gb", "data__remote": "s3://x"}, 32),
        ({"optimizer__decay_steps": 7, "optimizer__schedule": "wsd", "optimizer__warmup_steps": 3}, 32),
    ],
)
def test_what_is_allowed(changes: dict[str, object], document_multiple: int | None) -> None:
    assert problems(recipe(**changes), 1, document_multiple) == ()


def test_the_vocabulary_padding_divides_over_tensor_parallel_ranks() -> None:
    three = recipe(
        parallel__tensor=3,
        model__num_attention_heads=6,
        model__num_query_groups=3,
        model__hidden_size=96,
        model__ffn_hidden_size=96,
    )
    (problem,) = problems(three, 3)
    assert "vocabulary" in problem
    assert "2 or 4" in problem


def test_all_broken_rules_are_listed_at_once() -> None:
    bad = recipe(model__norm_bias=True, data__cache_limit="1gb", diffusion__block_size=24, train__global_batch_size=7)
    assert len(problems(bad)) == 4


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 4), st.integers(1, 8))
def test_a_batch_is_accepted_exactly_when_whole_micro_batches_fill_it(
    batch: int, micro: int, log_tp: int, dp: int
) -> None:
    tensor = 2 ** (log_tp - 1)
    wide = {"model__num_attention_heads": 8, "model__num_query_groups": 8}
    r = recipe(parallel__tensor=tensor, train__global_batch_size=batch, train__micro_batch_size=micro, **wide)
    found = problems(r, tensor * dp)
    if batch in range(micro * dp, batch + 1, micro * dp):
        assert found == ()
        assert data_parallel_size(r, tensor * dp) == dp
    else:
        (problem,) = found
        for suggested in re.findall(r"\d+", problem.partition("global batch of")[2]):
            fixed = recipe(
                parallel__tensor=tensor, train__global_batch_size=int(suggested), train__micro_batch_size=micro, **wide
            )
            assert problems(fixed, tensor * dp) == ()


def test_world_size_comes_from_the_recipe_before_the_machine() -> None:
    assert world_size_for_launch(recipe(launch__processes=3)) == 3


def test_world_size_without_a_gpu_is_what_tensor_parallelism_needs() -> None:
    torch = pytest.importorskip("torch")
    expected = torch.cuda.device_count() or 2
    assert world_size_for_launch(recipe(parallel__tensor=2)) == expected
