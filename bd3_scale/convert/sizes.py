"""Whether a configuration is of the weights beside it, asked before anything is made of its numbers."""

from __future__ import annotations

from collections.abc import Mapping

from bd3_scale.checkpoint.boxes import Shape
from bd3_scale.recipe.schema import ModelRecipe


def check_sizes(source: str, model: ModelRecipe, shapes: Mapping[str, Shape]) -> None:
    """Raise ValueError where config.json of `source` says more layers or heads than its tensors have room for."""
    if model.num_layers > len(shapes):
        raise ValueError(
            f"config.json of {source} says num_hidden_layers={model.num_layers}, and its weights have {len(shapes)} "
            "tensors in all: is it the model's own?"
        )
    for letter, key, heads in (
        ("q", "num_attention_heads", model.num_attention_heads),
        ("k", "num_key_value_heads", model.query_groups),
    ):
        weights = [shape for name, shape in shapes.items() if name.endswith(f".{letter}_proj.weight")]
        rows = max((shape[0] for shape in weights if shape and 0 not in shape), default=0)
        if heads * model.head_size > rows:
            raise ValueError(
                f"config.json of {source} says {key}={heads} of {model.head_size} channels, and {letter}_proj has "
                f"{rows} rows in its weights: is it the model's own?"
            )
