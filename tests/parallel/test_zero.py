"""Steps are counted where the optimiser counts them, torch's in its states, apex's in its parameter groups; the moving
average follows the count.
"""

from __future__ import annotations

import math

import pytest
import torch

from bd3_scale.model.build import build_model
from bd3_scale.model.rows import ModelInputs
from bd3_scale.parallel import engine as engine_module
from bd3_scale.parallel.engine import TrainingEngine
from bd3_scale.parallel.optimizer import adamw
from bd3_scale.parallel.zero import ema_decay
from bd3_scale.recipe.schema import ModelRecipe, OptimizerRecipe, ParallelRecipe
from bd3_scale.recipe.vocabulary import Vocabulary

MODEL = ModelRecipe(num_layers=1, hidden_size=16, num_attention_heads=2, ffn_hidden_size=24)


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


def start(groups, decay: float, zero_stage: int = 1) -> TrainingEngine:
    vocabulary, cpu = Vocabulary(size=60, eos_id=0, mask_id=59), torch.device("cpu")
    chunks = build_model(MODEL, vocabulary, groups, dtype=torch.float32, device=cpu, seed=1)
    return TrainingEngine(chunks, groups, OptimizerRecipe(ema_decay=decay), ParallelRecipe(zero_stage=zero_stage))


def train(engine: TrainingEngine, steps: range) -> None:
    for step in steps:
        engine.step([inputs(step)], tokens=8, lr=0.01)


def states(engine: TrainingEngine, name: str) -> torch.Tensor:
    """All of one state, fp64."""
    return torch.cat([fragment.states[name].double() for fragment in engine.zero.fragments()])


def resume(engine: TrainingEngine, of: TrainingEngine) -> TrainingEngine:
    for into, source in zip(engine.zero.fragments(), of.zero.fragments(), strict=True):
        for name, state in into.states.items():
            state.copy_(source.states[name])
    engine.zero.loaded(of.zero.step)
    return engine


MAKERS = {"torch": adamw, "apex": lambda parameters, *_, **__: CountsInGroups(parameters)}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_loaded_optimizer_goes_on_from_its_step(groups, monkeypatch, maker, decay) -> None:
    monkeypatch.setattr(engine_module, "adamw", MAKERS[maker])
    whole, half = start(groups, decay), start(groups, decay)
    train(whole, range(4))
    train(half, range(2))
    resumed = resume(start(groups, decay), half)
    train(resumed, range(2, 4))
    assert whole.zero.step == resumed.zero.step == 4
    for found, expected in zip(resumed.chunks[0].parameters(), whole.chunks[0].parameters(), strict=True):
        assert torch.equal(found, expected)
    for name in whole.zero.names:
        assert torch.equal(states(resumed, name), states(whole, name)), name


def test_decay_rises_from_two_elevenths_to_what_is_asked() -> None:
    found = [ema_decay(0.5, updates) for updates in range(1, 11)]
    assert found == [2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 0.5, 0.5, 0.5]
    assert ema_decay(0.9999, 10**6) == 0.9999
    assert next(updates for updates in range(100_000) if ema_decay(0.9999, updates) == 0.9999) == 89_990


# ZeRO-3 updates in parts, and apex is not used for it.
@pytest.mark.parametrize(("maker", "zero_stage"), [("torch", 1), ("torch", 2), ("torch", 3), ("apex", 1), ("apex", 2)])
def test_weights_have_their_share_of_the_average_in_closed_form(groups, monkeypatch, maker, zero_stage) -> None:
    """Those after update k have 9 / (10 + k) times the decays (1 + j) / (10 + j) of the n - k updates after it, that is
    9 (k + 2) ... (k + 9) / ((n + 2) ... (n + 10)); those that training began with have 2 ... 10 of the same.
    """
    monkeypatch.setattr(engine_module, "adamw", MAKERS[maker])
    engine, steps = start(groups, 0.9999, zero_stage), 5
    seen = [states(engine, "master")]
    for step in range(steps):
        train(engine, range(step, step + 1))
        seen.append(states(engine, "master"))
    shares = [math.prod(range(2, 11)), *(9 * math.prod(range(k + 2, k + 10)) for k in range(1, steps + 1))]
    total = math.prod(range(steps + 2, steps + 11))
    assert sum(shares) == total
    expected = sum(share / total * values for share, values in zip(shares, seen, strict=True))
    torch.testing.assert_close(states(engine, "ema"), expected, rtol=1e-5, atol=1e-7)


def test_a_resumed_average_goes_on_with_the_decay_of_its_step(groups) -> None:
    """The step that was loaded counts, whoever made it."""
    engine = start(groups, 0.9999)
    engine.zero.loaded(1000)
    before = states(engine, "ema")
    train(engine, range(1))
    expected = before.lerp(states(engine, "master"), 9 / 1011)
    torch.testing.assert_close(states(engine, "ema"), expected, rtol=1e-6, atol=1e-8)
