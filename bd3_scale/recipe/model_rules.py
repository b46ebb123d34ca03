"""Check the shape of the model, and its division over tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator

from bd3_scale.recipe.rules import nearest_divisors, nearest_multiples, rule
from bd3_scale.recipe.schema import Recipe
from bd3_scale.recipe.vocabulary import PADDING_MULTIPLE


@rule("model.num_attention_heads", "model.num_query_groups")
def _query_groups_divide_heads(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that num_attention_heads is a multiple of num_query_groups."""
    heads, groups = recipe.model.num_attention_heads, recipe.model.query_groups
    if heads % groups:
        yield (
            f"model.num_attention_heads={heads} does not divide into model.num_query_groups={groups}: "
            f"take num_query_groups {nearest_divisors(heads, groups)}"
        )


@rule("model.hidden_size", "model.num_attention_heads", "model.head_dim", "model.rotary_fraction")
def _rotary_channels_are_pairs(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that a head has a whole, even number of channels, and rotary embeddings turn an even number of them."""
    model = recipe.model
    heads = model.num_attention_heads
    if model.head_dim is None and model.hidden_size % heads:
        yield (
            f"model.hidden_size={model.hidden_size} does not divide into model.num_attention_heads={heads}: "
            f"set model.head_dim, or take hidden_size {nearest_multiples(model.hidden_size, heads)}"
        )
    elif model.head_size % 2:
        yield (
            f"a head has {model.head_size} channels, and rotary embeddings turn pairs of them: "
            f"set model.head_dim to {nearest_multiples(model.head_size, 2)}"
        )
    elif not model.rotary_channels or model.rotary_channels % 2:
        yield (
            f"model.rotary_fraction={model.rotary_fraction} of a head's {model.head_size} channels are "
            f"{model.rotary_channels}, and rotary embeddings turn pairs of them: take a fraction that gives "
            f"{nearest_multiples(model.rotary_channels, 2)}"
        )


@rule("model.norm_bias", "model.normalization")
def _rmsnorm_has_no_bias(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that norm_bias is set for layernorm only."""
    if recipe.model.norm_bias and recipe.model.normalization == "rmsnorm":
        yield "model.norm_bias=true, but rmsnorm has none: set model.norm_bias=false or model.normalization=layernorm"


@rule("parallel.tensor", "model.num_attention_heads", "model.num_query_groups", "model.ffn_hidden_size")
def _tensor_ranks_divide_the_layers(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that parallel.tensor divides the heads, the key/value heads and the MLP's width."""
    model, tensor = recipe.model, recipe.parallel.tensor
    for name, value in (
        ("num_attention_heads", model.num_attention_heads),
        ("num_query_groups", model.query_groups),
        ("ffn_hidden_size", model.ffn_hidden_size),
    ):
        if value % tensor:
            yield (
                f"model.{name}={value} does not divide into parallel.tensor={tensor}: "
                f"take tensor {nearest_divisors(value, tensor)}, or {name} {nearest_multiples(value, tensor)}"
            )


@rule("parallel.tensor")
def _tensor_ranks_divide_the_vocabulary(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that parallel.tensor divides the vocabulary, which is padded to a multiple of 128."""
    tensor = recipe.parallel.tensor
    if PADDING_MULTIPLE % tensor:
        yield (
            f"the vocabulary is padded to a multiple of {PADDING_MULTIPLE}, and tensor={tensor} does not divide "
            f"that: take parallel.tensor {nearest_divisors(PADDING_MULTIPLE, tensor)}"
        )
