"""Rules about a mixture of experts, and the ranks that share it out."""

from __future__ import annotations

import math
from collections.abc import Iterator

from bd3_scale.recipe.schema import ModelRecipe, MoeRecipe, Recipe


def moe_problems(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Yield the rules that `model.moe` and `parallel.expert` break, for people."""
    model, parallel = recipe.model, recipe.parallel
    if model.moe is None:
        if parallel.expert > 1:
            yield (
                f"parallel.expert={parallel.expert} shares out experts, and the model has none: "
                "set model.moe, or leave parallel.expert out"
            )
        return
    yield from mixture_problems(model)
    for name, size in _widths(model.moe).items():
        if size % parallel.tensor:
            yield (
                f"model.moe.{name}={size} does not divide into parallel.tensor={parallel.tensor}: "
                f"take tensor {math.gcd(size, parallel.tensor)}, or a multiple of {parallel.tensor}"
            )
    yield from _expert_parallel_problems(recipe, model.moe, world_size)


def _widths(moe: MoeRecipe) -> dict[str, int]:
    return {"ffn_hidden_size": moe.ffn_hidden_size, "shared_ffn_hidden_size": moe.shared_ffn_hidden_size}


def mixture_problems(model: ModelRecipe) -> Iterator[str]:
    """Yield the rules that a model's mixture, where it has one, breaks on any ranks, for people."""
    if (moe := model.moe) is None:
        return
    yield from _group_problems(moe)
    if model.activation != "swiglu" or model.mlp_bias:
        yield (
            f"experts are SwiGLU without biases, and the model has activation={model.activation}, mlp_bias="
            f"{str(model.mlp_bias).lower()}: set model.activation=swiglu and model.mlp_bias=false"
        )
    if moe.top_k > moe.num_experts:
        yield (
            f"model.moe.top_k={moe.top_k} are more than model.moe.num_experts={moe.num_experts}: "
            f"take top_k {moe.num_experts} at the most"
        )
    if moe.first_dense_layers >= model.num_layers:
        yield (
            f"model.moe.first_dense_layers={moe.first_dense_layers} of model.num_layers={model.num_layers} leave no "
            f"layer with experts: take {model.num_layers - 1} at the most, or leave model.moe out"
        )


def _group_problems(moe: MoeRecipe) -> Iterator[str]:
    top_groups = moe.top_groups or moe.groups
    if top_groups > moe.groups:
        yield f"model.moe.top_groups={top_groups} are more than model.moe.groups={moe.groups}: take {moe.groups}"
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


def _expert_parallel_problems(recipe: Recipe, moe: MoeRecipe, world_size: int) -> Iterator[str]:
    parallel = recipe.parallel
    if parallel.expert == 1:
        return
    if moe.num_experts % parallel.expert:
        yield (
            f"model.moe.num_experts={moe.num_experts} does not divide into parallel.expert={parallel.expert}: "
            f"take expert {math.gcd(moe.num_experts, parallel.expert)}"
        )
    ranks = parallel.tensor * parallel.pipeline
    if world_size % parallel.model_size == 0 and world_size // ranks % parallel.expert:
        yield (
            f"parallel.expert={parallel.expert} takes of the {world_size // ranks} data- and context-parallel ranks, "
            f"which it does not divide: take expert {math.gcd(world_size // ranks, parallel.expert)}, or start a "
            f"multiple of {ranks * parallel.expert} processes"
        )
    if parallel.zero_stage == 3 or parallel.offload_optimizer:
        option = "zero_stage=3" if parallel.zero_stage == 3 else "offload_optimizer=true"
        yield (
            f"parallel.{option} with parallel.expert={parallel.expert} is not supported: each kind of weights would "
            "need ranks of its own to divide it; take zero_stage 1 or 2 without offload_optimizer, or expert 1"
        )
