"""Derive from a recipe how its data must be prepared."""

from __future__ import annotations

import math

from bd3_scale.recipe.checks import check_block_size
from bd3_scale.recipe.schema import Recipe, RecipeError


def least_multiple(recipe: Recipe) -> int:
    """Return the least multiple of tokens that documents must be padded to; 1 where documents are not isolated.

    With it, every block size of the recipe's training and evaluations divides the length of every document.
    """
    return math.lcm(*recipe.diffusion.block_sizes) if recipe.data.isolate_documents else 1


def preparation(recipe: Recipe, seq_len: int | None, document_multiple: int | None) -> tuple[int, int]:
    """Return the sequence length and the document multiple to prepare a recipe's data with.

    seq_len, document_multiple: given on the command line; None: what the recipe needs.
    RecipeError: a given value does not suit the recipe.
    """
    if seq_len not in (None, recipe.data.seq_len):
        raise RecipeError([f"data.seq_len={recipe.data.seq_len}, but --seq-len is {seq_len}: leave that option out"])
    multiple = least_multiple(recipe) if document_multiple is None else document_multiple
    for block_size in recipe.diffusion.block_sizes:
        check_block_size(block_size, recipe.data, multiple)
    return recipe.data.seq_len, multiple
