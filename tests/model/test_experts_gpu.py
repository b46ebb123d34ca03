"""Compare, on a GPU, experts by one grouped product in bf16 with a product for each expert in fp32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bd3_scale.model.build import build_model
from bd3_scale.parallel.groups import lone_groups
from bd3_scale.recipe.schema import ModelRecipe, MoeRecipe
from bd3_scale.recipe.vocabulary import Vocabulary

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

MODEL = ModelRecipe(
    num_layers=1,
    hidden_size=256,
    num_attention_heads=4,
    ffn_hidden_size=256,
    moe=MoeRecipe(num_experts=16, top_k=4, ffn_hidden_size=192),
)


def outputs_and_gradients(dtype: torch.dtype, device: str, counts: list[int]) -> list[Tensor]:
    (model,) = build_model(
        MODEL,
        Vocabulary(size=60, eos_id=0, mask_id=57),
        lone_groups(),
        dtype=dtype,
        device=torch.device(device),
        seed=1,
    )
    experts = model.mixtures[0].experts
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(counts), 256, generator=generator).to(device, dtype).requires_grad_()
    weights = torch.rand(sum(counts), generator=generator).to(device).requires_grad_()
    gradient = torch.randn(sum(counts), 256, generator=generator).to(device, dtype)
    out = experts(rows, weights, torch.tensor(counts, device=device))
    out.backward(gradient)
    found = [out, rows.grad, weights.grad, experts.linear_fc1.weight.grad, experts.linear_fc2.weight.grad]
    return [tensor.detach().float().cpu() for tensor in found]


@pytest.mark.parametrize("counts", [[64] * 16, [0, 700, *[1] * 7, 0, 0, 3, 250, 17, 0, 31]])
def test_a_grouped_product_is_that_of_each_expert(counts: list[int]) -> None:
    exact = outputs_and_gradients(torch.float32, "cpu", counts)
    for found, expected in zip(outputs_and_gradients(torch.bfloat16, "cuda", counts), exact, strict=True):
        assert (found - expected).norm() <= 2e-2 * expected.norm()
    again = [outputs_and_gradients(torch.bfloat16, "cuda", counts) for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*again, strict=True))
