"""Check rules about a mixture of experts: what they find, and that the way out that they name works."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bd3_scale.recipe.checks import world_size_for_launch
from bd3_scale.recipe.moe_rules import mixture_problems
from bd3_scale.recipe.schema import ModelRecipe, MoeRecipe
from tests.recipe.test_checks import problems, recipe

MOE = {"num_experts": 8, "top_k": 2, "ffn_hidden_size": 32}


@pytest.mark.parametrize(
    ("changes", "world_size"),
    [
        ({"model__moe": MOE}, 1),
        ({"model__moe": MOE, "parallel__expert": 4}, 4),
        ({"model__moe": MOE, "parallel__expert": 4, "parallel__tensor": 2}, 8),
        ({"model__moe": MOE, "parallel__expert": 2, "parallel__context": 2}, 2),
        ({"model__moe": MOE | {"groups": 4, "top_groups": 1, "score": "sigmoid", "bias": True}}, 1),
        ({"model__moe": MOE | {"first_dense_layers": 1, "shared_ffn_hidden_size": 48}, "parallel__tensor": 2}, 2),
        ({"model__moe": MOE, "parallel__zero_stage": 3}, 1),
    ],
)
def test_what_is_sound_passes(changes, world_size):
    assert problems(recipe(**changes), world_size) == ()


@pytest.mark.parametrize(
    ("changes", "world_size", "says"),
    [
        ({"parallel__expert": 2}, 2, "parallel.expert=2 shares out experts, and the model has none"),
        ({"model__moe": MOE, "model__activation": "gelu"}, 1, "set model.activation=swiglu"),
        ({"model__moe": MOE, "model__mlp_bias": True}, 1, "mlp_bias=true: set model.activation=swiglu"),
        ({"model__moe": MOE | {"top_k": 9}}, 1, "take top_k 8 at the most"),
        ({"model__moe": MOE | {"first_dense_layers": 2}}, 1, "take 1 at the most, or leave model.moe out"),
        ({"model__moe": MOE | {"groups": 3}}, 1, "take groups 1, or num_experts a multiple of 3"),
        ({"model__moe": MOE | {"groups": 8, "top_groups": 2}}, 1, "take groups 4 at the most"),
        ({"model__moe": MOE | {"groups": 2, "top_groups": 3}}, 1, "top_groups=3 are more than model.moe.groups=2"),
        ({"model__moe": MOE | {"groups": 4, "top_groups": 1, "top_k": 3}}, 1, "take top_groups 2, or top_k 2"),
        ({"model__moe": MOE | {"ffn_hidden_size": 31}, "parallel__tensor": 2}, 2, "moe.ffn_hidden_size=31 does not"),
        ({"model__moe": MOE | {"shared_ffn_hidden_size": 3}, "parallel__tensor": 2}, 2, "shared_ffn_hidden_size=3"),
        ({"model__moe": MOE | {"num_experts": 6}, "parallel__expert": 4}, 4, "does not divide into parallel.expert=4"),
        ({"model__moe": MOE, "parallel__expert": 4}, 2, "start a multiple of 4 processes"),
        ({"model__moe": MOE, "parallel__expert": 2, "parallel__zero_stage": 3}, 2, "zero_stage=3 with parallel.expert"),
        ({"model__moe": MOE, "parallel__expert": 2, "parallel__offload_optimizer": True}, 2, "offload_optimizer=true"),
        ({"model__rotary_fraction": 0.2}, 1, "rotary_fraction=0.2 of a head's 16 channels are 3"),
    ],
)
def test_what_breaks_a_rule_is_told_with_the_way_out(changes, world_size, says):
    (found,) = problems(recipe(**changes), world_size)
    assert says in found


def test_as_many_processes_start_as_the_experts_need():
    for parallel, ranks in (({"expert": 4}, 4), ({"expert": 4, "context": 2}, 4), ({"expert": 2, "tensor": 2}, 4)):
        changes = {f"parallel__{key}": value for key, value in parallel.items()}
        assert world_size_for_launch(recipe(model__moe=MOE, **changes)) == ranks


@given(
    st.builds(
        MoeRecipe,
        num_experts=st.integers(1, 12),
        top_k=st.integers(1, 6),
        ffn_hidden_size=st.just(8),
        groups=st.integers(1, 6),
        top_groups=st.none() | st.integers(1, 6),
        score=st.sampled_from(["softmax", "sigmoid"]),
    )
)
def test_a_mixture_without_problems_chooses_different_experts(moe):
    import torch

    from bd3_scale.model.router import choose

    model = ModelRecipe(num_layers=2, hidden_size=8, num_attention_heads=1, ffn_hidden_size=8, moe=moe)
    if list(mixture_problems(model)):
        return
    scores = torch.rand(5, moe.num_experts, generator=torch.Generator().manual_seed(0))
    experts = choose(scores, None, moe)
    assert experts.shape == (5, moe.top_k)
    assert all(len(set(row)) == moe.top_k for row in experts.tolist())
    size = moe.num_experts // moe.groups
    assert all(len({expert // size for expert in row}) <= (moe.top_groups or moe.groups) for row in experts.tolist())
