"""The attention kernels' tiles of a run: chosen once, the same on every rank and after every resume."""

from __future__ import annotations

import torch

from bd3_scale.attention.kernels.tiles import use_choices
from bd3_scale.checkpoint.manifest import CheckpointManifest
from bd3_scale.parallel.collective import on_rank_zero
from bd3_scale.parallel.groups import local_device
from bd3_scale.recipe.schema import Recipe


def settle_tiles(recipe: Recipe, backend: str, dtype: torch.dtype, kept: CheckpointManifest | None) -> None:
    """Take the checkpoint's tiles, and where it has none those that rank 0 finds fastest, on all ranks (collective).

    Other tiles add in another order: with its own, a resumed run is bitwise the run that was not interrupted.
    """
    if backend != "triton":
        return
    use_choices(kept.attention_tiles if kept is not None else {})
    use_choices(on_rank_zero(lambda: _tune(recipe, dtype)))


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
