"""Check every family of optimisers: it continues from loaded states, whether steps are counted in the states (torch) or
in the parameter groups (apex), and the moving average follows the count.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from bd3_scale.model.build import build_model
from bd3_scale.model.layout import parameter_layouts
from bd3_scale.model.rows import ModelInputs
from bd3_scale.parallel.engine import TrainingEngine
from bd3_scale.parallel.zero import ema_decay
from bd3_scale.recipe.schema import ModelRecipe, OptimizerRecipe, ParallelRecipe
from bd3_scale.recipe.vocabulary import Vocabulary
from tests.parallel import families  # noqa: F401

MODEL = ModelRecipe(num_layers=1, hidden_size=16, num_attention_heads=2, ffn_hidden_size=24)


# Norms have their own weight decay, and the output layer has its own learning rate.
GROUPS = [{"match": "*layernorm*", "weight_decay": 0.2}, {"match": "output_layer.*", "lr_scale": 0.5}]


def inputs(seed: int) -> ModelInputs:
    clean = torch.randint(0, 59, (1, 8), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(8)[None]
    spans = torch.stack([torch.zeros(1, 8), positions // 4 * 4, positions // 4 * 4 + 4]).int()
    tokens = torch.cat([torch.full_like(clean, 59), clean], 1)
    return ModelInputs(tokens, positions, spans, 1, torch.arange(8), clean[0], torch.ones(8), 0, 0)


def start(groups, /, decay: float, zero_stage: int = 1, **optimizer) -> TrainingEngine:
    vocabulary, cpu = Vocabulary(size=60, eos_id=0, mask_id=59), torch.device("cpu")
    chunks = build_model(MODEL, vocabulary, groups, dtype=torch.float32, device=cpu, seed=1)
    settings = OptimizerRecipe(ema_decay=decay, **optimizer)
    return TrainingEngine(chunks, groups, settings, ParallelRecipe(zero_stage=zero_stage))


def train(engine: TrainingEngine, steps: range) -> None:
    for step in steps:
        engine.step([inputs(step)], tokens=8, lr=0.01)


def states(engine: TrainingEngine, name: str) -> torch.Tensor:
    """Return all values of one state, fp64."""
    return torch.cat([fragment.states[name].double() for fragment in engine.zero.fragments()])


def resume(engine: TrainingEngine, of: TrainingEngine) -> TrainingEngine:
    for into, source in zip(engine.zero.fragments(), of.zero.fragments(), strict=True):
        for name, state in into.states.items():
            state.copy_(source.states[name])
    engine.zero.loaded(of.zero.step)
    return engine


# ZeRO-3 updates in parts, and apex is not used with it.
@pytest.mark.parametrize(
    ("family", "decay", "zero_stage"),
    [
        ("adamw", 0.0, 1),
        ("adamw", 0.9, 3),
        ("counts-in-groups", 0.9, 1),
        ("lion", 0.9, 1),
        ("lion", 0.0, 3),
        ("bold-momentum", 0.0, 1),
        ("bold-momentum", 0.9, 3),
    ],
)
def test_a_loaded_optimizer_goes_on_from_its_step(groups, family, decay, zero_stage) -> None:
    how = {"zero_stage": zero_stage, "family": family, "groups": GROUPS}
    whole, half = start(groups, decay, **how), start(groups, decay, **how)
    assert whole.optimizer_name.startswith(family)
    assert whole.optimizer_name.endswith(", 3 groups")
    train(whole, range(4))
    train(half, range(2))
    resumed = resume(start(groups, decay, **how), half)
    train(resumed, range(2, 4))
    assert whole.zero.step == resumed.zero.step == 4
    for found, expected in zip(resumed.chunks[0].parameters(), whole.chunks[0].parameters(), strict=True):
        assert torch.equal(found, expected)
    for name in whole.zero.names:
        assert torch.equal(states(resumed, name), states(whole, name)), name
        assert states(whole, name).count_nonzero() > 0, name


def test_decay_rises_from_two_elevenths_to_what_is_asked() -> None:
    found = [ema_decay(0.5, updates) for updates in range(1, 11)]
    assert found == [2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 0.5, 0.5, 0.5]
    assert ema_decay(0.9999, 10**6) == 0.9999
    assert next(updates for updates in range(100_000) if ema_decay(0.9999, updates) == 0.9999) == 89_990


@pytest.mark.parametrize(
    ("family", "zero_stage"),
    [("adamw", 1), ("adamw", 2), ("adamw", 3), ("counts-in-groups", 1), ("counts-in-groups", 2)],
)
def test_weights_have_their_share_of_the_average_in_closed_form(groups, family, zero_stage) -> None:
    """Check the weights after update k: 9 / (10 + k) times the decays (1 + j) / (10 + j) of the n - k later updates,
    which is 9 (k + 2) ... (k + 9) / ((n + 2) ... (n + 10)). The initial weights have 2 ... 10 of the same.
    """
    engine, steps = start(groups, 0.9999, zero_stage, family=family), 5
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
    """Check that the loaded step counts, whoever made it."""
    engine = start(groups, 0.9999)
    engine.zero.loaded(1000)
    before = states(engine, "ema")
    train(engine, range(1))
    expected = before.lerp(states(engine, "master"), 9 / 1011)
    torch.testing.assert_close(states(engine, "ema"), expected, rtol=1e-6, atol=1e-8)


def test_a_pattern_that_no_tensor_matches_is_refused_with_the_names_that_there_are(groups) -> None:
    said = r"no tensor's name matches '\*\.norm\.\*' or 'embeding\*'; the model has:\n"
    with pytest.raises(ValueError, match=said) as refused:
        start(
            groups, 0.0, groups=[{"match": "*.norm.*", "lr_scale": 2}, *GROUPS, {"match": "embeding*", "lr_scale": 2}]
        )
    names = [line.strip() for line in str(refused.value).splitlines()[1:]]
    assert len(names) == 11
    assert {"embedding.word_embeddings.weight", "decoder.layers.self_attention.q_layernorm.weight"} < set(names)


def test_a_tensor_has_the_last_of_what_matches_it_key_by_key(groups) -> None:
    """Check a step without gradients, in which a weight keeps 1 - rate · decay."""
    kept = {
        "decoder.final_layernorm.weight": 1 - 0.1 * 3 * 0.5,
        "decoder.layers.input_layernorm.weight": 1 - 0.1 * 3 * 0.25,
        "decoder.layers.mlp.linear_fc1.weight": 1 - 0.1 * 2 * 0.125,
        "decoder.layers.mlp.linear_fc2.weight": 1,
        "embedding.word_embeddings.weight": 1 - 0.1 * 0.125,
        "output_layer.weight": 1,
    }
    patterns = [
        {"match": "*.mlp.*", "lr_scale": 2},
        {"match": "*.linear_fc2.*", "weight_decay": 0},
        {"match": "*layernorm*", "lr_scale": 3, "weight_decay": 0.25},
        {"match": "decoder.final_*", "weight_decay": 0.5},
        {"match": "output_layer.weight", "lr_scale": 0},
    ]
    engine = start(groups, 0.0, family="lion", weight_decay=0.125, groups=patterns)
    names = {id(layout.parameter): layout.pieces[0].key for layout in parameter_layouts(engine.chunks)}
    before = [(names[id(f.parameter)], f.states["master"], f.states["master"].clone()) for f in engine.zero.fragments()]
    nothing = replace(inputs(0), weights=torch.zeros(8))
    engine.step([nothing], tokens=8, lr=0.1)
    for name, now, then in before:
        if name in kept:
            torch.testing.assert_close(now, then * kept[name], rtol=1e-6, atol=0, msg=name)
