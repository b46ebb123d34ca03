"""Which tiles the attention kernels of a run take; that they are timed needs a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bd3_scale.attention.kernels import tiles
from bd3_scale.checkpoint.manifest import CheckpointManifest
from bd3_scale.train.tiles import settle_tiles

CHIP = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_choices() -> Iterator[None]:
    tiles.use_choices({})
    yield
    tiles.use_choices({})


def manifest(kept: dict[str, list[int]]) -> CheckpointManifest:
    return CheckpointManifest.model_construct(attention_tiles=kept)


def test_a_choice_comes_back_from_the_plain_values_of_a_checkpoint() -> None:
    default = tiles.tile_for("forward", 128, torch.bfloat16, CHIP)
    other = tiles.candidates_on(CHIP, "forward", 128, torch.bfloat16)[1]
    assert default != other
    tiles.choose("forward", 128, torch.bfloat16, CHIP, other)
    kept = tiles.choices()
    tiles.use_choices({})
    assert tiles.tile_for("forward", 128, torch.bfloat16, CHIP) == default

    settle_tiles(None, "triton", torch.bfloat16, manifest(kept))  # type: ignore[arg-type]

    assert tiles.tile_for("forward", 128, torch.bfloat16, CHIP) == other
    assert tiles.tile_for("forward", 64, torch.bfloat16, CHIP) != other
    assert tiles.choices() == kept


def test_backends_without_tiles_leave_them_alone() -> None:
    settle_tiles(None, "cpu", torch.bfloat16, manifest({"forward": [1, 2, 3, 4]}))  # type: ignore[arg-type]
    assert tiles.choices() == {}
