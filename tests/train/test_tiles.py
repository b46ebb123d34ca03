"""Check which tiles the attention kernels of a run take; only a GPU can time them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bd3_scale.attention.kernels import tiles
from bd3_scale.recipe.schema import DataRecipe, DiffusionRecipe, ModelRecipe, Recipe, TrainRecipe
from bd3_scale.train.tiles import resolve_tiles

CHIP = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_choices() -> Iterator[None]:
    tiles.use_choices({})
    yield
    tiles.use_choices({})


RECIPE = Recipe(
    name="tiny",
    model=ModelRecipe(num_layers=1, hidden_size=256, num_attention_heads=2, ffn_hidden_size=64),
    diffusion=DiffusionRecipe(block_size=4),
    data=DataRecipe(path="unused", seq_len=8),
    train=TrainRecipe(steps=1, global_batch_size=1, micro_batch_size=1),
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the choice is of the GPU")
def test_the_choice_of_a_checkpoint_comes_back_and_is_not_timed_again(groups: object) -> None:
    """Check that the tiles are not timed again, which would fail here, without a GPU."""
    kernels = ("forward", "query_gradient", "clean_key_gradient", "noisy_key_gradient")
    default = tiles.tile_for("forward", 128, torch.bfloat16, CHIP)
    for kernel in kernels:
        tiles.choose(kernel, 128, torch.bfloat16, CHIP, tiles.candidates_on(CHIP, kernel, 128, torch.bfloat16)[-1])
    kept = tiles.choices()
    tiles.use_choices({})
    assert tiles.tile_for("forward", 128, torch.bfloat16, CHIP) == default

    assert resolve_tiles(RECIPE, "triton", torch.bfloat16, kept) == kept

    assert tiles.choices() == kept
    assert tiles.tile_for("forward", 128, torch.bfloat16, CHIP) != default


def test_backends_without_tiles_leave_them_alone() -> None:
    assert resolve_tiles(RECIPE, "cpu", torch.bfloat16, {"forward": [1, 2, 3, 4]}) == {}
    assert tiles.choices() == {}
