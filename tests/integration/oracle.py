"""Three optimiser steps of the plain PyTorch model, and how far a layout is from them."""

from __future__ import annotations

import torch

from tests.integration import plain_model
from tests.integration.cases import BATCH, CASES, LENGTH, STEPS, VOCABULARY, Case, batch


def three_steps(case: Case, initial: dict[str, torch.Tensor]) -> dict:
    """AdamW, clipping by the global norm, gradient accumulation and the moving average, as plain torch does them."""
    weights = {key.removeprefix("master."): value.clone().requires_grad_() for key, value in initial.items()}
    # A layer's vectors are stacked into matrices: no decay on what is one-dimensional in a layer.
    vectors = [w for key, w in weights.items() if "norm" in key or key.endswith("bias")]
    matrices = [w for w in weights.values() if not any(w is vector for vector in vectors)]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-4)
    average = {key: value.detach().clone() for key, value in weights.items()}
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        if case.objective == "next_token":
            loss = plain_model.next_token_loss(weights, case.model, VOCABULARY, batch(case, step))
        else:
            loss = plain_model.loss(weights, case.model, VOCABULARY, batch(case, step), case.block_size, case.objective)
        loss = loss / (BATCH * LENGTH)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(weights.values(), 0.5)))
        losses.append(loss.item())
        optimizer.step()
        decay = min(0.5, (2 + step) / (11 + step))  # of update step + 1
        average = {key: decay * average[key] + (1 - decay) * weights[key].detach() for key in weights}
    assert min(norms) > 0.5, "the clip must act"
    states = {f"master.{key}": weight.detach() for key, weight in weights.items()}
    states |= {f"ema.{key}": value for key, value in average.items()}
    for key, weight in weights.items():
        states |= {f"{name}.{key}": optimizer.state[weight][name] for name in ("exp_avg", "exp_avg_sq")}
    return {"losses": losses, "norms": norms, "states": states}


class Oracle:
    """The plain model's steps of each case, computed once."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[dict, dict]] = {}

    def differences(self, case_name: str, found: dict) -> dict[str, float]:
        """‖Δ‖/‖·‖ of losses, norms, and every weight and moving average after the last step."""
        case = CASES[case_name]
        if case_name not in self._known:
            self._known[case_name] = found["initial"], three_steps(case, found["initial"])
        initial, expected = self._known[case_name]
        assert found["initial"].keys() == initial.keys()
        assert all(torch.equal(found["initial"][key], initial[key]) for key in initial), "layouts begin alike"
        assert found["states"].keys() == expected["states"].keys()
        differ = {
            f"{name} of step {step}": abs(a - b) / abs(b)
            for name in ("losses", "norms")
            for step, (a, b) in enumerate(zip(found[name], expected[name], strict=True), 1)
        }
        weights = [key for key in expected["states"] if key.startswith(("master.", "ema."))]
        return differ | {key: difference(found["states"][key], expected["states"][key]) for key in weights}


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))
