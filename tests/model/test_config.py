"""Check the options that megatron-core gets besides the recipe's numbers: combinations that corrupt are impossible."""

from __future__ import annotations

import pytest
import torch

from bd3_scale.model.config import transformer_config
from bd3_scale.recipe.schema import ModelRecipe, ParallelRecipe

MODEL = ModelRecipe(num_layers=8, hidden_size=32, num_attention_heads=4, ffn_hidden_size=48)


def config(device: str, **parallel: object):
    how = {"dtype": torch.float32, "device": torch.device(device), "deterministic": False}
    return transformer_config(MODEL, ParallelRecipe(**parallel), **how)


@pytest.mark.parametrize("pipeline", [2, 4])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_interleaved_schedule_overlaps_its_messages(pipeline: int, device: str) -> None:
    """Check the option without which two stages that are neighbours on both sides confuse their messages."""
    interleaved = config(device, pipeline=pipeline, virtual_pipeline=2)
    assert interleaved.overlap_p2p_comm
    assert not interleaved.batch_p2p_comm
    assert not config(device, pipeline=pipeline).overlap_p2p_comm


@pytest.mark.parametrize(
    ("device", "virtual_pipeline", "given_back"),
    [("cpu", 1, False), ("cpu", 2, False), ("cuda", 2, False), ("cuda", 1, True)],
)
def test_nobody_reads_an_output_whose_memory_was_given_back(
    device: str, virtual_pipeline: int, given_back: bool
) -> None:
    """Check this for megatron-core 0.16.1, which frees outputs that its isend still reads (Megatron-LM, pull request
    4047)."""
    assert config(device, pipeline=2, virtual_pipeline=virtual_pipeline).deallocate_pipeline_outputs == given_back


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_gradients_go_where_zero_reads_them(device: str) -> None:
    assert not config(device).gradient_accumulation_fusion
