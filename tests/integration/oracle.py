"""Compute optimiser steps of the plain PyTorch model, and compare layouts with them."""

from __future__ import annotations

import torch

from tests.integration import plain_model
from tests.integration.cases import BATCH, CASES, LENGTH, VOCABULARY, Case, Layout, batch


def settings(name: str, optimizer: str) -> dict[str, float]:
    """Return learning rate and weight decay of a tensor, worked out by hand."""
    # A layer's vectors are stacked into matrices: tensors that are one-dimensional in a layer do not decay.
    scale, decay = 1.0, 0.0 if "norm" in name or name.endswith("bias") else 0.1
    if optimizer == "adamw":
        return {"lr": 0.01, "weight_decay": decay}
    if name.startswith("embedding"):
        scale = 0.3
    elif name.endswith((".linear_fc1.weight", ".linear_fc2.weight")):
        decay = 0.3
    elif "final_layernorm" in name:
        scale, decay = 0.5, 0.05
    elif "layernorm" in name:
        scale, decay = 2.0, 0.05
    return {"lr": 0.01 * scale, "weight_decay": decay}


class PlainLion(torch.optim.Optimizer):
    """Algorithm 2 of Chen et al. (2023), as it is printed."""

    def __init__(self, groups: list[dict]) -> None:
        super().__init__(groups, {"betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            (weight,), (beta1, beta2) = group["params"], group["betas"]
            momentum = self.state[weight].get("exp_avg", torch.zeros_like(weight))
            c = beta1 * momentum + (1 - beta1) * weight.grad
            assert not (c.abs() < 1e-5 * c.abs().mean())[c != 0].any(), "a sign hangs on rounding: take another seed"
            weight -= group["lr"] * (torch.sign(c) + group["weight_decay"] * weight)
            self.state[weight]["exp_avg"] = beta2 * momentum + (1 - beta2) * weight.grad


BIAS = "decoder.layers.mlp.router.expert_bias"


def plain_steps(case: Case, initial: dict[str, torch.Tensor], bias: torch.Tensor | None, of: str = "adamw") -> dict:
    """Take steps with the optimizer `of`, clipping by the global norm, gradient accumulation and the moving average, in
    plain torch with settings for each tensor; the experts' biases start from `bias`.
    """
    moe = case.model.moe
    weights = {key.removeprefix("master."): value.clone().requires_grad_() for key, value in initial.items()}
    groups = [{"params": [weight]} | settings(name, of) for name, weight in weights.items()]
    optimizer = PlainLion(groups) if of == "lion" else torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-4)
    average = {key: value.detach().clone() for key, value in weights.items()}
    losses, norms, loads, gaps = [], [], [], []
    for step in range(case.steps):
        optimizer.zero_grad()
        routed: list[plain_model.Routed] = []
        tensors = weights if bias is None else weights | {BIAS: bias}
        loss = loss_of(case, tensors, step, routed) / (BATCH * LENGTH)
        aux, z = plain_model.balance_losses(routed, moe) if moe else (0.0, 0.0)
        (loss + moe.aux_loss * aux + moe.z_loss * z if moe else loss).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(weights.values(), 0.5)))
        losses.append(loss.item())
        optimizer.step()
        decay = min(0.5, (2 + step) / (11 + step))  # the decay of update step + 1
        average = {key: decay * average[key] + (1 - decay) * weights[key].detach() for key in weights}
        if moe:
            loads.append(plain_model.load(routed, moe.num_experts))
            gaps.extend(layer.gap for layer in routed)
            bias = None if bias is None else plain_model.moved(bias, loads[-1], moe)
    assert min(gaps, default=1) > 1e-6, "an expert hangs on rounding: take another seed"
    assert min(norms) > 0.5, "the clip must act"
    states = {f"master.{key}": weight.detach() for key, weight in weights.items()}
    states |= {f"ema.{key}": value for key, value in average.items()}
    for key, weight in weights.items():
        states |= {f"{name}.{key}": value for name, value in optimizer.state[weight].items() if name != "step"}
    return {"losses": losses, "norms": norms, "states": states, "routed": loads, "bias": bias}


def loss_of(case: Case, weights: dict[str, torch.Tensor], step: int, routed: list) -> torch.Tensor:
    if case.objective == "next_token":
        return plain_model.next_token_loss(weights, case.model, VOCABULARY, batch(case, step), routed)
    of = (VOCABULARY, batch(case, step), case.block_size, case.objective)
    return plain_model.loss(weights, case.model, *of, routed)


class Oracle:
    """The plain model's steps of each case and optimizer, computed once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], tuple[dict, dict]] = {}

    def differences(self, layout: Layout, found: dict) -> dict[str, float]:
        """Return ‖Δ‖/‖·‖ of losses, norms, and every weight and moving average after the last step. The number of rows
        that each expert was sent, and the biases that follow from it, must be equal.
        """
        key = layout.case, layout.optimizer
        if key not in self._known:
            steps = plain_steps(CASES[key[0]], found["initial"], found["initial_bias"], key[1])
            self._known[key] = found["initial"], steps
        initial, expected = self._known[key]
        assert found["initial"].keys() == initial.keys()
        assert all(torch.equal(found["initial"][key], initial[key]) for key in initial), "layouts begin alike"
        assert found["states"].keys() == expected["states"].keys()
        assert len(found["routed"]) == len(expected["routed"])
        for step, (ours, plain) in enumerate(zip(found["routed"], expected["routed"], strict=True), 1):
            assert torch.equal(ours, plain), f"experts were sent other rows in step {step}: {ours} for {plain}"
        same = found["bias"] is expected["bias"] or torch.equal(found["bias"], expected["bias"])
        assert same, f"biases are {found['bias']} for {expected['bias']}"
        differ = {
            f"{name} of step {step}": abs(a - b) / abs(b)
            for name in ("losses", "norms")
            for step, (a, b) in enumerate(zip(found[name], expected[name], strict=True), 1)
        }
        weights = [key for key in expected["states"] if key.startswith(("master.", "ema."))]
        return differ | {key: difference(found["states"][key], expected["states"][key]) for key in weights}


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))
