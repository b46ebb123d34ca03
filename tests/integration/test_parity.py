"""The megatron model under tensor parallelism and ZeRO against the plain PyTorch model: same weights, fp32, 1e-5."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import cases
import plain_model
from launching import run_ranks

TOLERANCE = 1e-5
# name: world size, tensor parallel, ZeRO stage
LAYOUTS = {"tp1": (1, 1, 1), "tp2": (2, 2, 1), "dp2-zero2": (2, 1, 2)}


@pytest.fixture(scope="module", params=LAYOUTS)
def results(request, tmp_path_factory):
    world_size, tensor, zero_stage = LAYOUTS[request.param]
    out = tmp_path_factory.mktemp("parity") / "results.pt"
    run_ranks(Path(__file__).with_name("parity_ranks.py"), world_size, out, tensor, zero_stage)
    return torch.load(out)


def difference(found, expected):
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def plain_loss(weights, name, seed):
    model, block_size, lengths = cases.CASES[name]
    return plain_model.loss(weights, model, cases.VOCABULARY, cases.batch(lengths, seed), block_size)


@pytest.mark.parametrize("name", cases.CASES)
def test_loss_and_gradients(results, name):
    found = results[name]
    weights = {key: value.clone().requires_grad_() for key, value in found["weights"].items()}
    loss = plain_loss(weights, name, seed=1)
    loss.backward()
    assert found["loss"] == pytest.approx(loss.item(), rel=TOLERANCE)
    assert found["gradients"].keys() == weights.keys()
    worst = {key: difference(found["gradients"][key], weights[key].grad) for key in weights}
    assert max(worst.values()) <= TOLERANCE, worst


def test_three_steps(results):
    """AdamW, clipping by the global norm, gradient accumulation and the moving average, as plain torch does them."""
    found = results["steps"]
    weights = {key: value.clone().requires_grad_() for key, value in results["qwen-packed"]["weights"].items()}
    # A layer's norm weights are vectors stacked into a matrix: no decay on what is one-dimensional in a layer.
    vectors = [w for key, w in weights.items() if "norm" in key]
    matrices = [w for key, w in weights.items() if "norm" not in key]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-4)
    average = {key: value.detach().clone() for key, value in weights.items()}
    for step in range(3):
        optimizer.zero_grad()
        loss = plain_loss(weights, "qwen-packed", seed=step) / (cases.BATCH * cases.LENGTH)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), 0.5)
        optimizer.step()
        average = {key: 0.5 * average[key] + 0.5 * weights[key].detach() for key in weights}
        assert found["losses"][step] == pytest.approx(loss.item(), rel=TOLERANCE)
        assert found["norms"][step] == pytest.approx(norm.item(), rel=TOLERANCE)
    assert norm > 0.5, "the clip must have acted"
    worst = {key: difference(found["weights"][key], weights[key].detach()) for key in weights}
    worst |= {f"ema {key}": difference(found["ema"][key], average[key]) for key in weights}
    assert max(worst.values()) <= TOLERANCE, worst
