"""Choose the tiles of the attention kernels, once for a run.

A benchmark imports this file where PyTorch, megatron-core and DeepSpeed alone are installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from bd3_scale.attention.kernels.tiles import use_choices
from bd3_scale.parallel.collective import on_rank_zero
from bd3_scale.parallel.groups import local_device
from bd3_scale.recipe.schema import Recipe


def resolve_tiles(
    recipe: Recipe, backend: str, dtype: torch.dtype, kept: Mapping[str, Sequence[int]]
) -> dict[str, list[int]]:
    """Return the tiles of the attention kernels: the `kept` ones, and for other kernels those that are fastest on
    rank 0, the same on all ranks (collective). Only the backend `triton` has tiles.
    """
    if backend != "triton":
        return {}
    use_choices(kept)
    tiles = on_rank_zero(lambda: _tune(recipe, dtype))
    use_choices(tiles)
    return tiles


def _tune(recipe: Recipe, dtype: torch.dtype) -> dict[str, list[int]]:
    from bd3_scale.attention.kernels.tuning import tune

    model, tensor = recipe.model, recipe.parallel.tensor
    return tune(
        (recipe.train.micro_batch_size, recipe.data.seq_len, model.num_attention_heads // tensor, model.head_size),
        model.query_groups // tensor,
        recipe.diffusion.block_size,
        dtype,
        local_device(),
        deterministic=recipe.deterministic,
    )
