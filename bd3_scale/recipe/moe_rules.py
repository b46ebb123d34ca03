"""Check a mixture of experts, and the ranks that divide it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

from bd3_scale.recipe.rules import rule
from bd3_scale.recipe.schema import ModelRecipe, MoeRecipe, Recipe

# Checks of a model with a mixture, whatever ranks divide it: imports and checkpoints need them without a recipe.
MixtureCheck = Callable[[ModelRecipe, MoeRecipe], Iterator[str]]
_MIXTURE: list[MixtureCheck] = []


def _mixture_rule(*keys: str) -> Callable[[MixtureCheck], MixtureCheck]:
    """Return a decorator that registers a rule of recipes, and a check of `mixture_problems`."""

    def add(check: MixtureCheck) -> MixtureCheck:
        @rule(*keys)
        @functools.wraps(check)
        def of_recipe(recipe: Recipe, world_size: int) -> Iterator[str]:
            if recipe.model.moe is not None:
                yield from check(recipe.model, recipe.model.moe)

        _MIXTURE.append(check)
        return check

    return add


def mixture_problems(model: ModelRecipe) -> Iterator[str]:
    """Yield a message for each rule that a model's mixture, if it has one, breaks on any number of ranks."""
    if model.moe is not None:
        for check in _MIXTURE:
            yield from check(model, model.moe)


@_mixture_rule("model.moe.top_groups", "model.moe.groups")
def _top_groups_exist(model: ModelRecipe, moe: MoeRecipe) -> Iterator[str]:
    """Check that top_groups is at most groups."""
    if (moe.top_groups or moe.groups) > moe.groups:
        yield f"model.moe.top_groups={moe.top_groups} are more than model.moe.groups={moe.groups}: take {moe.groups}"


@_mixture_rule("model.moe.num_experts", "model.moe.groups", "model.moe.top_groups", "model.moe.top_k")
def _groups_hold_the_experts(model: ModelRecipe, moe: MoeRecipe) -> Iterator[str]:
    """Check that groups divides num_experts, groups have two experts or more, and top_groups hold top_k of them."""
    top_groups = moe.top_groups or moe.groups
    if moe.num_experts % moe.groups:
        yield (
            f"model.moe.num_experts={moe.num_experts} does not divide into model.moe.groups={moe.groups}: "
            f"take groups {math.gcd(moe.num_experts, moe.groups)}, or num_experts a multiple of {moe.groups}"
        )
        return
    size = moe.num_experts // moe.groups
    if moe.groups > 1 and size < 2:
        yield (
            f"model.moe.groups={moe.groups} of model.moe.num_experts={moe.num_experts} have one expert each, and a "
            f"group is judged by its two best: take groups {moe.num_experts // 2} at the most"
        )
    elif moe.top_k <= moe.num_experts and moe.top_k > top_groups * size:
        yield (
            f"model.moe.top_k={moe.top_k} experts of a row lie in model.moe.top_groups={top_groups} groups of {size}: "
            f"take top_groups {-(-moe.top_k // size)}, or top_k {top_groups * size}"
        )


@_mixture_rule("model.moe", "model.activation", "model.mlp_bias")
def _experts_are_swiglu(model: ModelRecipe, moe: MoeRecipe) -> Iterator[str]:
    """Check that a model with experts has activation: swiglu, and no mlp_bias."""
    if model.activation != "swiglu" or model.mlp_bias:
        yield (
            f"experts are SwiGLU without biases, and the model has activation={model.activation}, mlp_bias="
            f"{str(model.mlp_bias).lower()}: set model.activation=swiglu and model.mlp_bias=false"
        )


@_mixture_rule("model.moe.top_k", "model.moe.num_experts")
def _top_experts_exist(model: ModelRecipe, moe: MoeRecipe) -> Iterator[str]:
    """Check that top_k is at most num_experts."""
    if moe.top_k > moe.num_experts:
        yield (
            f"model.moe.top_k={moe.top_k} are more than model.moe.num_experts={moe.num_experts}: "
            f"take top_k {moe.num_experts} at the most"
        )


@_mixture_rule("model.moe.first_dense_layers", "model.num_layers")
def _a_layer_has_experts(model: ModelRecipe, moe: MoeRecipe) -> Iterator[str]:
    """Check that first_dense_layers leaves a layer with experts."""
    if moe.first_dense_layers >= model.num_layers:
        yield (
            f"model.moe.first_dense_layers={moe.first_dense_layers} of model.num_layers={model.num_layers} leave no "
            f"layer with experts: take {model.num_layers - 1} at the most, or leave model.moe out"
        )


@rule("parallel.expert", "model.moe")
def _expert_ranks_have_experts(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that parallel.expert is above 1 only for a model with experts."""
    if recipe.model.moe is None and recipe.parallel.expert > 1:
        yield (
            f"parallel.expert={recipe.parallel.expert} shares out experts, and the model has none: "
            "set model.moe, or leave parallel.expert out"
        )


@rule("parallel.tensor", "model.moe.ffn_hidden_size", "model.moe.shared_ffn_hidden_size")
def _tensor_ranks_divide_experts(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that parallel.tensor divides the width of the experts and of the shared expert."""
    moe, tensor = recipe.model.moe, recipe.parallel.tensor
    if moe is None:
        return
    widths = {"ffn_hidden_size": moe.ffn_hidden_size, "shared_ffn_hidden_size": moe.shared_ffn_hidden_size}
    for name, size in widths.items():
        if size % tensor:
            yield (
                f"model.moe.{name}={size} does not divide into parallel.tensor={tensor}: "
                f"take tensor {math.gcd(size, tensor)}, or a multiple of {tensor}"
            )


@rule(
    "parallel.expert",
    "model.moe.num_experts",
    "launch.processes",
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.context",
)
def _expert_ranks_divide(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that parallel.expert divides num_experts, and the data- and context-parallel ranks."""
    moe, parallel = recipe.model.moe, recipe.parallel
    if moe is None or parallel.expert == 1:
        return
    if moe.num_experts % parallel.expert:
        yield (
            f"model.moe.num_experts={moe.num_experts} does not divide into parallel.expert={parallel.expert}: "
            f"take expert {math.gcd(moe.num_experts, parallel.expert)}"
        )
    ranks = parallel.tensor * parallel.pipeline
    # A world size that `model_size`, which has `context` in it, does not divide breaks another rule.
    if world_size % parallel.model_size == 0 and world_size // ranks % parallel.expert:
        yield (
            f"parallel.expert={parallel.expert} takes of the {world_size // ranks} data- and context-parallel ranks, "
            f"which it does not divide: take expert {math.gcd(world_size // ranks, parallel.expert)}, or start a "
            f"multiple of {ranks * parallel.expert} processes"
        )


@rule("parallel.expert", "parallel.zero_stage", "parallel.offload_optimizer")
def _expert_ranks_keep_states(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that expert parallelism is not combined with zero_stage 3 or offload_optimizer."""
    parallel = recipe.parallel
    if recipe.model.moe is None or parallel.expert == 1:
        return
    if parallel.zero_stage == 3 or parallel.offload_optimizer:
        option = "zero_stage=3" if parallel.zero_stage == 3 else "offload_optimizer=true"
        yield (
            f"parallel.{option} with parallel.expert={parallel.expert} is not supported: each kind of weights would "
            "need ranks of its own to divide it; take zero_stage 1 or 2 without offload_optimizer, or expert 1"
        )
