"""Sampling from a small random model: what is drawn, what is kept, when it stops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from bd3_scale.attention.spans import make_spans
from bd3_scale.generate.sampler import generate
from bd3_scale.model.build import build_model
from bd3_scale.recipe.schema import DataRecipe, DiffusionRecipe, ModelRecipe, Recipe, TrainRecipe
from bd3_scale.recipe.vocabulary import Vocabulary

MASK = 1
VOCABULARY = Vocabulary(size=5, eos_id=0, mask_id=MASK)  # the mask in the midst of the clean ids 2, 3, 4


@pytest.fixture(scope="module")
def model(groups):
    recipe = Recipe(
        name="tiny",
        model=ModelRecipe(
            num_layers=1, hidden_size=16, num_attention_heads=2, ffn_hidden_size=16, init_std=1.0, head_bias=True
        ),
        diffusion=DiffusionRecipe(block_size=4),
        data=DataRecipe(path="unused", seq_len=8),
        train=TrainRecipe(steps=1, global_batch_size=1, micro_batch_size=1),
    )
    (built,) = build_model(recipe, VOCABULARY, groups, dtype=torch.float32, device=torch.device("cpu"), seed=2)
    built.requires_grad_(False)
    built.output_layer.bias[VOCABULARY.eos_id] = -30.0  # texts do not end by chance
    return built


def test_a_seed_gives_the_same_text_and_another_seed_another(model):
    texts = [generate(model, [2], block_size=4, max_new_tokens=24, seed=seed).tokens for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert set(itertools.chain(*texts)) <= {2, 3, 4}


def test_counts_passes_and_cuts_at_the_limit(model):
    """A prompt of 6 with blocks of 4: one prefill; the first block starts with 2 given tokens; 9 new ones end in a
    third.
    """
    sample = generate(model, [2, 3, 4, 2, 3, 4], block_size=4, max_new_tokens=9)
    assert (len(sample.tokens), sample.stopped_by) == (9, "length")
    assert (sample.nfe, sample.cache_passes) == (2 + 4 + 4, 1 + 2)


def test_temperature_zero_takes_the_most_likely_tokens(token_nll, model):
    """At block size 1 the text is the greedy left-to-right one, computed without a cache."""
    tokens = [2, 3]
    for _ in range(6):
        clean = torch.tensor([[*tokens, 2]])
        noisy = torch.tensor([[*tokens, MASK]])
        spans = make_spans(torch.zeros_like(clean, dtype=torch.int32), 1)
        nlls = {}
        for token in (0, 2, 3, 4):
            clean[0, -1] = token
            nlls[token] = float(
                token_nll(model, noisy, clean, torch.arange(clean.shape[1])[None], spans, torch.tensor([len(tokens)]))
            )
        tokens.append(min(nlls, key=nlls.get))
    assert generate(model, [2, 3], block_size=1, max_new_tokens=6, temperature=0).tokens == tokens[2:]


def test_stops_after_the_block_that_holds_eos(model):
    model.output_layer.bias[VOCABULARY.eos_id] = 30.0
    try:
        sample = generate(model, [2, 3, 4], block_size=4, max_new_tokens=100)
    finally:
        model.output_layer.bias[VOCABULARY.eos_id] = -30.0
    assert (sample.tokens, sample.stopped_by, sample.nfe) == ([], "eos", 1)


def test_stops_when_the_last_256_tokens_have_little_entropy(model):
    """Three tokens have at most ln 3 nats, below the 4 nats of the rule: the text ends with the block that fills the
    window.
    """
    sample = generate(model, [2], block_size=4, max_new_tokens=300, min_entropy=4.0)
    assert sample.stopped_by == "entropy"
    assert len(sample.tokens) == 259  # 3 in the prompt's block, then whole blocks until there are 256
    unbounded = generate(model, [2], block_size=4, max_new_tokens=300)
    assert (len(unbounded.tokens), unbounded.stopped_by) == (300, "length")


def test_no_prompt(model):
    """The first block is all masks and sees nothing before it."""
    sample = generate(model, [], block_size=4, max_new_tokens=8)
    assert (len(sample.tokens), sample.nfe, sample.cache_passes) == (8, 8, 1)


def test_first_hitting_draws_from_the_enumerated_distribution(model):
    """A block of 2 tokens: every order and outcome enumerated, compared with 500 samples by chi-square."""
    prompt = [2, 4]
    expected = dict.fromkeys(itertools.product((2, 3, 4), repeat=2), 0.0)
    for order in ((0, 1), (1, 0)):
        for outcome in expected:
            probability, block = 0.5, [MASK, MASK]
            for place in order:
                probability *= math.exp(log_probability(model, prompt, block, place, outcome[place]))
                block[place] = outcome[place]
            expected[outcome] += probability
    assert sum(expected.values()) == pytest.approx(1, abs=1e-6)
    draws = 500
    counts = dict.fromkeys(expected, 0)
    for seed in range(draws):
        counts[tuple(generate(model, prompt, block_size=2, max_new_tokens=2, seed=seed).tokens)] += 1
    chi_square = sum((counts[o] - draws * p) ** 2 / (draws * p) for o, p in expected.items())
    assert chi_square < 26.1  # 8 degrees of freedom, one in a thousand


def test_every_place_of_a_block_is_unmasked_first_equally_often(model, monkeypatch):
    """First hitting takes the masked places in uniformly random order; seen from the blocks that the model is shown."""
    shown = []
    decode = model.decode

    def observed(block, positions, cache):
        shown.append(block[0].tolist())
        return decode(block, positions, cache)

    monkeypatch.setattr(model, "decode", observed)
    draws, firsts = 400, [0, 0, 0, 0]
    for seed in range(draws):
        shown.clear()
        generate(model, [], block_size=4, max_new_tokens=4, seed=seed)
        assert [block.count(MASK) for block in shown] == [4, 3, 2, 1]
        firsts[next(i for i, token in enumerate(shown[1]) if token != MASK)] += 1
    chi_square = sum((count - draws / 4) ** 2 / (draws / 4) for count in firsts)
    assert chi_square < 16.3  # 3 degrees of freedom, one in a thousand


def log_probability(model, prompt, block, place, token):
    cache = model.new_cache(1, 4)
    clean = torch.tensor([prompt])
    model.prefill(clean, torch.arange(2)[None], make_spans(torch.zeros_like(clean, dtype=torch.int32), 2), cache)
    logits = model.decode(torch.tensor([block]), torch.tensor([[2, 3]]), cache)
    return float(logits[0, place].double().log_softmax(0)[token])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": [MASK]}, "no clean tokens"),
        ({"prompt": [5]}, "no clean tokens"),
        ({"prompt": [2], "max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"prompt": [2], "temperature": -1.0}, "temperature is -1.0"),
    ],
)
def test_bad_input(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(model, **{"block_size": 4, "max_new_tokens": 4} | arguments)
