"""Steps are counted where the optimiser counts them: torch's in its states, apex's in its parameter groups."""

from __future__ import annotations

import pytest
import torch

from bd3_scale.model.build import build_model
from bd3_scale.model.rows import ModelInputs
from bd3_scale.parallel import engine as engine_module
from bd3_scale.parallel.engine import TrainingEngine
from bd3_scale.parallel.optimizer import adamw
from bd3_scale.recipe.schema import DataRecipe, DiffusionRecipe, ModelRecipe, Recipe, TrainRecipe
from bd3_scale.recipe.vocabulary import Vocabulary

RECIPE = Recipe(
    name="tiny",
    model=ModelRecipe(num_layers=1, hidden_size=16, num_attention_heads=2, ffn_hidden_size=24),
    diffusion=DiffusionRecipe(block_size=4),
    data=DataRecipe(path="unused", seq_len=8),
    train=TrainRecipe(steps=1, global_batch_size=1, micro_batch_size=1),
)


class CountsInGroups(torch.optim.Optimizer):
    """Adam with apex FusedAdam's bookkeeping: a count in each group, from the first step on, and none in the states."""

    def __init__(self, params, **settings):
        super().__init__(params, {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0} | settings)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (low, high), count = group["betas"], group["step"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["exp_avg"].lerp_(parameter.grad, 1 - low)
                state["exp_avg_sq"].mul_(high).addcmul_(parameter.grad, parameter.grad, value=1 - high)
                size = (state["exp_avg_sq"] / (1 - high**count)).sqrt() + group["eps"]
                parameter -= group["lr"] * state["exp_avg"] / (1 - low**count) / size


def inputs(seed: int) -> ModelInputs:
    clean = torch.randint(0, 59, (1, 8), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(8)[None]
    spans = torch.stack([torch.zeros(1, 8), positions // 4 * 4, positions // 4 * 4 + 4]).int()
    tokens = torch.cat([torch.full_like(clean, 59), clean], 1)
    return ModelInputs(tokens, positions, spans, 1, torch.arange(8), clean[0], torch.ones(8), 0, 0)


@pytest.mark.parametrize(
    "make", [adamw, lambda parameters, *_, **__: CountsInGroups(parameters)], ids=["torch", "apex"]
)
def test_a_loaded_optimizer_goes_on_from_its_step(groups, monkeypatch, make) -> None:
    monkeypatch.setattr(engine_module, "adamw", make)

    def start(steps: range) -> TrainingEngine:
        vocabulary, cpu = Vocabulary(size=60, eos_id=0, mask_id=59), torch.device("cpu")
        chunks = build_model(RECIPE, vocabulary, groups, dtype=torch.float32, device=cpu, seed=1)
        engine = TrainingEngine(chunks, groups, RECIPE.optimizer, RECIPE.parallel)
        for step in steps:
            engine.step([inputs(step)], tokens=8, lr=0.01)
        return engine

    whole, half, resumed = start(range(4)), start(range(2)), start(range(0))
    for into, of in zip(resumed.zero.fragments(), half.zero.fragments(), strict=True):
        for name, state in into.states.items():
            state.copy_(of.states[name])
    resumed.zero.loaded(half.zero.step)
    for step in (2, 3):
        resumed.step([inputs(step)], tokens=8, lr=0.01)
    assert whole.zero.step == resumed.zero.step == 4
    for found, expected in zip(resumed.chunks[0].parameters(), whole.chunks[0].parameters(), strict=True):
        assert torch.equal(found, expected)
