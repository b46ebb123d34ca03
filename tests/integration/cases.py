"""Models and batches that the parity tests share: the test computes them plainly, the ranks through megatron."""

from __future__ import annotations

import torch

from bd3_scale.recipe.schema import (
    DataRecipe,
    DiffusionRecipe,
    ModelRecipe,
    OptimizerRecipe,
    ParallelRecipe,
    Recipe,
    TrainRecipe,
)
from bd3_scale.recipe.vocabulary import Vocabulary

LENGTH, BATCH = 32, 4
VOCABULARY = Vocabulary(size=60, eos_id=0, mask_id=57)  # ids 58 and 59 are clean: the mask need not be the last

QWEN = ModelRecipe(
    num_layers=2, hidden_size=48, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=64, init_std=0.2
)
OFFICIAL = ModelRecipe(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=2,
    head_dim=24,
    ffn_hidden_size=64,
    activation="gelu_tanh",
    normalization="layernorm",
    norm_bias=True,
    qk_norm=False,
    mlp_bias=True,
    attention_bias=True,
    head_bias=True,
    init_std=0.2,
)
TIED = QWEN.model_copy(
    update={"tie_embeddings": True, "num_query_groups": None, "activation": "gelu", "normalization": "layernorm"}
)
PACKED = [7, 1, 24]  # document lengths: ragged last blocks, and a document shorter than a block

# name: model, block size, document lengths
CASES = {
    "qwen-packed": (QWEN, 8, PACKED),
    "official": (OFFICIAL, 4, [LENGTH]),
    "tied-autoregressive": (TIED, 1, [LENGTH]),
    "mdlm": (QWEN, LENGTH, [LENGTH]),
}


def recipe(model: ModelRecipe, block_size: int, *, tensor: int = 1, zero_stage: int = 1, **optimizer: float) -> Recipe:
    return Recipe(
        name="parity",
        model=model,
        diffusion=DiffusionRecipe(block_size=block_size),
        data=DataRecipe(path="unused", seq_len=LENGTH),
        train=TrainRecipe(steps=3, global_batch_size=BATCH, micro_batch_size=1, precision="fp32"),
        parallel=ParallelRecipe(tensor=tensor, zero_stage=zero_stage),
        optimizer=OptimizerRecipe(lr=0.01, eps=1e-4, clip_grad_norm=0.5, **optimizer),
    )


def batch(document_lengths: list[int], seed: int) -> dict[str, torch.Tensor]:
    """Random tokens and masks of whole sequences; the last sequence of the batch has no masked token at all."""
    generator = torch.Generator().manual_seed(seed)
    doc_ids = torch.repeat_interleave(torch.arange(len(document_lengths)), torch.tensor(document_lengths))
    starts = torch.tensor([0, *document_lengths[:-1]]).cumsum(0)[doc_ids]
    clean = torch.randint(0, 57, (BATCH, LENGTH), generator=generator)
    rate = torch.rand(BATCH, 1, generator=generator).expand(-1, LENGTH) * 0.9 + 0.1
    masked = torch.rand(BATCH, LENGTH, generator=generator) < rate
    masked[-1] = False
    return {
        "clean": clean,
        "masked": masked,
        "mask_rate": rate,
        "doc_ids": doc_ids.expand(BATCH, -1),
        "document_start": starts.expand(BATCH, -1),
        "positions": (torch.arange(LENGTH) - starts).expand(BATCH, -1),
    }
