from __future__ import annotations

import re
from typing import ClassVar

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from bd3_scale.parallel.optimizer import OptimizerFamily
from bd3_scale.recipe.checks import check_against_data, check_recipe, data_parallel_size, world_size_for_launch
from bd3_scale.recipe.schema import ParallelRecipe, Recipe, RecipeError
from bd3_scale.registry import optimizers


@optimizers.register("of-a-plug-in")
class OfAPlugIn(OptimizerFamily):
    options: ClassVar = {"memory": 0.9}


def recipe(**changes: object) -> Recipe:
    """Return a recipe that breaks no rule; changes are dotted keys with `__` for the dot."""
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


FOUR_LAYERS = {"model__num_layers": 4, "parallel__pipeline": 2, "parallel__virtual_pipeline": 2}
FOUR_GROUPS = {"model__num_query_groups": 4, "parallel__tensor": 4, "parallel__sequence": True}
ONE_BLOCK = {"diffusion__block_size": 64, "data__isolate_documents": False}
TWO_SOURCES = {"data__path": "", "data__sources": [{"name": name, "path": name} for name in ("a", "b")]}


def problems(r: Recipe, world_size: int = 1, document_multiple: int | None = 32) -> tuple[str, ...]:
    try:
        check_recipe(r, world_size)
        if document_multiple is not None:
            check_against_data(r, world_size, document_multiple)
    except RecipeError as error:
        return error.problems
    return ()


def test_a_sound_recipe_passes_at_every_layout_that_fits() -> None:
    for world_size in (1, 2, 4):
        for tensor in (1, 2):
            if world_size % tensor == 0:
                assert problems(recipe(parallel__tensor=tensor), world_size) == ()


def test_names_that_nothing_has_are_refused_with_the_nearest_before_any_rule() -> None:
    wrong = recipe(diffusion__noise_schedule="cosin", diffusion__mask_rate_low=0.5).model_copy(
        update={"attention_backend": "tritton"}
    )
    schedule, backend = problems(wrong)
    assert schedule.startswith("diffusion.noise_schedule=cosin: no noise schedule is called 'cosin': did you mean cos")
    assert "attention_backend=tritton" in backend
    assert "did you mean triton?" in backend


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
        ({"diffusion__mask_rate_low": 0.5, "diffusion__noise_schedule": "cosine"}, 1, ["0.5", "cosine", "0 to 1"]),
        ({"diffusion__mask_rate_high": 0.5, "diffusion__noise_steps": 8}, 1, ["0.5", "noise_steps=8", "0 to 1"]),
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
        ({"data__path": ""}, 1, ["data.path", "is missing", "data.sources"]),
        (
            {"data__sources": [{"name": "a", "path": "a", "weight": 1}]},
            1,
            ["data.path and data.remote", "leave them out"],
        ),
        ({"data__path": "", "data__sources": [{"name": "a", "path": "a"}]}, 1, ["a has no weight", "data.stages"]),
        ({"data__path": "", "data__sources": [{"name": "a", "path": "a", "weight": 1}] * 2}, 1, ["a, a", "rename one"]),
        (
            {**TWO_SOURCES, "data__stages": [{"until": 5, "weights": {"a": 1}}, {"until": 5, "weights": {"b": 1}}]},
            1,
            ["`until` is 5, 5", "last one has none"],
        ),
        ({**TWO_SOURCES, "data__stages": [{"weights": {"a": 1, "c": 1}}]}, 1, ["stages.0.weights.c", "they are a, b"]),
        ({**TWO_SOURCES, "data__stages": [{"weights": {}}]}, 1, ["stages.0.weights: is empty"]),
        (
            {
                "data__path": "",
                "data__sources": [{"name": "a", "path": "a", "weight": 1}],
                "data__stages": [{"weights": {"a": 1}}],
            },
            1,
            ["a has a weight beside"],
        ),
        (
            {"launch__deadlines": {"data": 1800}},
            1,
            ["launch.deadlines.data=1800", "data.retry_minutes=30 (1800 s)", "more than that"],
        ),
        ({"train__recompute": "full", "train__recompute_layers": 3}, 1, ["recompute_layers=3", "2 layers", "lower"]),
        ({"optimizer__warmup_steps": 11}, 1, ["warmup_steps=11", "steps=10"]),
        ({"optimizer__decay_steps": 2}, 1, ["decay_steps=2", "wsd", "cosine"]),
        (
            {"optimizer__decay_steps": 8, "optimizer__schedule": "wsd", "optimizer__warmup_steps": 3},
            1,
            ["warmup_steps=3", "decay_steps=8", "steps=10"],
        ),
        ({"optimizer__family": "adam"}, 1, ["optimizer.family", "'adam'", "did you mean adamw"]),
        ({"optimizer__family": "sgd"}, 1, ["'sgd'", "known are adamw, lion", "plugins"]),
        ({"optimizer__family": "lion", "optimizer__eps": 1e-6}, 1, ["optimizer.eps=1e-06", "family=lion", "leave"]),
        ({"optimizer__groups": [{"match": "a*"}]}, 1, ["groups: 'a*' gives nothing", "lr_scale or weight_decay"]),
        ({"optimizer__options": {"beta": 0.9}}, 1, ["optimizer.options.beta", "family=adamw", "takes none"]),
        (
            {"optimizer__family": "of-a-plug-in", "optimizer__options": {"memry": 0.9}},
            1,
            ["optimizer.options.memry", "takes memory"],
        ),
        (
            {"optimizer__family": "of-a-plug-in", "optimizer__options": {"memory": "long"}},
            1,
            ["optimizer.options.memory='long'", "no float"],
        ),
        (
            {"parallel__virtual_pipeline": 2},
            1,
            ["virtual_pipeline=2", "pipeline is 1", "virtual_pipeline=1", "2 or more"],
        ),
        (
            {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2},
            2,
            ["num_layers=2", "pipeline=2 x virtual_pipeline=2 = 4 chunks", "or take num_layers"],
        ),
        (
            {"parallel__pipeline": 2, "parallel__layers_per_chunk": [1, 2]},
            2,
            ["layers_per_chunk=[1, 2]", "2 chunks of 3 layers", "2 chunks of model.num_layers=2", "leave it out"],
        ),
        (
            {**FOUR_LAYERS, "parallel__layers_per_chunk": [2, 2]},
            2,
            ["layers_per_chunk=[2, 2]", "2 chunks of 4 layers", "4 chunks of model.num_layers=4"],
        ),
        (
            {"parallel__pipeline": 2, "parallel__zero_stage": 3},
            2,
            ["zero_stage=3", "pipeline=2", "deadlocks", "zero_stage 1", "pipeline 1"],
        ),
        (
            {"train__recompute_layers": 1, "train__recompute": "selective"},
            1,
            ["recompute_layers=1", "recompute is selective", "recompute=full", "leave recompute_layers out"],
        ),
        ({"parallel__sequence": True}, 1, ["sequence=true", "tensor is 1", "sequence=false", "tensor 2"]),
        (
            {"parallel__context": 2, "data__seq_len": 48},
            2,
            ["seq_len=48", "block_size=8", "context=2", "seq_len 32 or 64"],
        ),
        (
            {"parallel__context": 2, **ONE_BLOCK, "diffusion__block_size": 50, "data__seq_len": 50},
            2,
            ["seq_len=50", "context=2", "seq_len and block_size 48 or 52"],
        ),
        (
            {**FOUR_GROUPS, "diffusion__block_size": 2, "data__seq_len": 66},
            4,
            ["sequence=true", "tensor=4", "seq_len=66", "seq_len 64 or 68"],
        ),
        (
            {**FOUR_GROUPS, "parallel__context": 2, "diffusion__block_size": 1, "data__seq_len": 20},
            8,
            ["sequence=true", "tensor=4", "seq_len=20 / context=2", "seq_len 16 or 24"],
        ),
        (
            {"parallel__tensor": 2, "parallel__pipeline": 2, "parallel__context": 2},
            12,
            ["12 processes", "tensor=2 x pipeline=2 x context=2", "8 or 16", "launch.processes"],
        ),
        (
            {**FOUR_LAYERS, "train__global_batch_size": 6},
            2,
            ["interleaved", "pipeline=2", "a rank has 3", "global batch of 4 or 8"],
        ),
        ({**ONE_BLOCK, "diffusion__noisy_copies": 2}, 1, ["noisy_copies=2", "block_size=64", "seq_len=64", "copies=1"]),
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
        ({"train__recompute": "full", "train__recompute_layers": 1}, 32),
        ({"optimizer__family": "lion", "optimizer__betas": [0.9, 0.99]}, 32),
        ({"optimizer__family": "of-a-plug-in", "optimizer__options": {"memory": 0}}, 32),
        ({"parallel__layers_per_chunk": [2]}, 32),
        ({"parallel__zero_stage": 3}, 32),
        ({"diffusion__noisy_copies": 2}, 32),
    ],
)
def test_what_is_allowed(changes: dict[str, object], document_multiple: int | None) -> None:
    assert problems(recipe(**changes), 1, document_multiple) == ()


@pytest.mark.parametrize(
    ("changes", "world_size"),
    [
        ({"parallel__pipeline": 2, "parallel__zero_stage": 2}, 2),
        ({**FOUR_LAYERS, "parallel__layers_per_chunk": [1, 1, 1, 1]}, 2),
        ({**FOUR_LAYERS, "parallel__tensor": 2, "parallel__sequence": True, "parallel__context": 2}, 8),
        ({"parallel__context": 4, "parallel__zero_stage": 3}, 8),
        # A block that is the whole sequence may be cut: 52 divides into 4 ranges, which no other block size would.
        ({**ONE_BLOCK, "parallel__context": 2, "diffusion__block_size": 52, "data__seq_len": 52}, 2),
    ],
)
def test_layouts_that_are_allowed(changes: dict[str, object], world_size: int) -> None:
    assert problems(recipe(**changes), world_size) == ()


@pytest.mark.parametrize(
    ("changes", "world_size"),
    [
        ({"parallel__context": 2, "data__seq_len": 48}, 2),
        ({"parallel__context": 4, "data__seq_len": 24}, 4),
        ({**FOUR_GROUPS, "diffusion__block_size": 2, "data__seq_len": 66}, 4),
        ({**FOUR_GROUPS, "parallel__context": 2, "diffusion__block_size": 1, "data__seq_len": 20}, 8),
        # Several rules apply to one number.
        ({**FOUR_GROUPS, "diffusion__block_size": 6, "data__seq_len": 30}, 4),
        ({**FOUR_GROUPS, "parallel__context": 2, "diffusion__block_size": 3, "data__seq_len": 12}, 8),
        ({**FOUR_GROUPS, "parallel__context": 2, "diffusion__block_size": 1, "data__seq_len": 62}, 8),
    ],
)
def test_the_sequence_lengths_that_a_problem_suggests_have_none(changes: dict[str, object], world_size: int) -> None:
    (problem,) = problems(recipe(**changes), world_size, None)
    suggested = re.findall(r"\d+", problem.partition("take seq_len")[2])
    assert suggested
    for length in suggested:
        assert problems(recipe(**changes | {"data__seq_len": int(length)}), world_size, None) == ()


@pytest.mark.parametrize("batch", [2, 3, 5, 6, 10])
def test_the_batches_that_a_problem_suggests_suit_the_interleaved_schedule(batch: int) -> None:
    (problem,) = problems(recipe(**FOUR_LAYERS, train__global_batch_size=batch), 2)
    suggested = re.findall(r"\d+", problem.partition("global batch of")[2])
    assert suggested
    for better in suggested:
        assert problems(recipe(**FOUR_LAYERS, train__global_batch_size=int(better)), 2) == ()


@given(st.integers(1, 60), st.integers(1, 8), st.integers(1, 4))
def test_layers_that_do_not_divide_evenly_go_to_the_middle(layers: int, pipeline: int, virtual: int) -> None:
    count = pipeline * virtual
    assume(layers >= count)
    chunks = ParallelRecipe(pipeline=pipeline, virtual_pipeline=virtual).chunks(layers)
    assert len(chunks) == count
    assert sum(chunks) == layers
    assert min(chunks) >= 1
    assert max(chunks) - min(chunks) <= 1
    assert max(chunks[0], chunks[-1]) <= min(chunks[1:-1], default=layers)


def test_layers_of_each_chunk_are_those_of_the_recipe() -> None:
    assert ParallelRecipe(pipeline=2, virtual_pipeline=2, layers_per_chunk=(1, 3, 2, 1)).chunks(7) == (1, 3, 2, 1)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 8))
def test_data_parallelism_is_what_remains(tensor: int, pipeline: int, context: int, data: int) -> None:
    r = recipe(parallel__tensor=tensor, parallel__pipeline=pipeline, parallel__context=context)
    assert data_parallel_size(r, tensor * pipeline * context * data) == data


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


def test_world_size_without_a_gpu_is_what_the_layout_needs() -> None:
    torch = pytest.importorskip("torch")
    expected = torch.cuda.device_count() or 12
    assert world_size_for_launch(recipe(parallel__tensor=2, parallel__pipeline=2, parallel__context=3)) == expected


@pytest.mark.parametrize(("saves", "evaluates", "fits"), [(2, 5, True), (4, 3, False), (0, 5, False), (2, 0, False)])
def test_the_best_checkpoints_are_among_those_that_are_evaluated(saves: int, evaluates: int, fits: bool) -> None:
    sections = {"checkpoint": {"every_steps": saves, "keep_best": 1}, "evaluation": {"every_steps": evaluates}}
    found = problems(Recipe.model_validate(recipe().model_dump(mode="json") | sections))
    assert (found == ()) == fits
    if not fits:
        (problem,) = found
        assert "checkpoint.keep_best=1 needs checkpoints that are evaluated" in problem
