"""Sample from a small random model: check which tokens are drawn, what is kept, and when it stops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from bd3_scale.attention.spans import make_spans
from bd3_scale.generate.config import SamplingConfig
from bd3_scale.generate.draft import Request
from bd3_scale.generate.draw import Drawing
from bd3_scale.generate.sampler import denoise
from bd3_scale.model.build import build_model
from bd3_scale.recipe.schema import ModelRecipe
from bd3_scale.recipe.vocabulary import Vocabulary
from tests.generate.sampling import generate, generate_batch

MASK = 1
FLAT = 8.0  # at this temperature no outcome is too rare for a chi-square test
VOCABULARY = Vocabulary(size=5, eos_id=0, mask_id=MASK)  # the mask is between the clean ids 2, 3, 4


@pytest.fixture(scope="module")
def model(groups):
    shape = ModelRecipe(
        num_layers=1, hidden_size=16, num_attention_heads=2, ffn_hidden_size=16, init_std=1.0, head_bias=True
    )
    (built,) = build_model(shape, VOCABULARY, groups, dtype=torch.float32, device=torch.device("cpu"), seed=2)
    built.requires_grad_(False)
    built.output_layer.bias[VOCABULARY.eos_id] = -300.0  # no text ends by chance
    return built


def test_a_seed_gives_the_same_text_and_another_seed_another(model):
    texts = [generate(model, [2], block_size=4, max_new_tokens=24, seed=seed).tokens for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert set(itertools.chain(*texts)) <= {2, 3, 4}


def test_counts_passes_and_cuts_at_the_limit(model):
    """Check a prompt of 6 with blocks of 4: one prefill, 2 given tokens in the first block; 9 more end in a third."""
    sample = generate(model, [2, 3, 4, 2, 3, 4], block_size=4, max_new_tokens=9)
    assert (len(sample.tokens), sample.stopped_by) == (9, "length")
    assert (sample.nfe, sample.cache_passes) == (2 + 4 + 4, 1 + 2)


def test_temperature_zero_takes_the_most_likely_tokens(token_nll, model):
    """Check block size 1, whose text is the greedy left-to-right one, computed without a cache."""
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
        model.output_layer.bias[VOCABULARY.eos_id] = -300.0
    assert (sample.tokens, sample.stopped_by, sample.nfe) == ([], "eos", 1)


def test_any_of_several_ends_stops_a_text(model):
    how = {"block_size": 4, "max_new_tokens": 40}
    whole = generate(model, [2, 3, 4], **how).tokens
    for ends in ([whole[9]], [whole[17], 4], [2, 3, 4]):
        sample = generate(model, [2, 3, 4], eos_ids=ends, **how)
        first = min(whole.index(end) for end in ends if end in whole)
        assert (sample.tokens, sample.stopped_by) == (whole[:first], "eos")


def test_the_last_256_tokens_end_a_text_by_little_entropy_and_are_cut(model):
    """Check a text of three tokens (at most ln 3 nats, below the rule's 4): it ends with the block that fills the
    window, and the window is cut off.
    """
    sample = generate(model, [2], block_size=4, max_new_tokens=300, min_entropy=4.0)
    assert sample.stopped_by == "entropy"
    unbounded = generate(model, [2], block_size=4, max_new_tokens=300)
    assert (len(unbounded.tokens), unbounded.stopped_by) == (300, "length")
    # 3 in the prompt's block, then whole blocks until there are 256.
    assert (len(sample.tokens), sample.nfe) == (3, 259)
    assert sample.tokens == unbounded.tokens[:3]
    whole = generate(model, [2, 3, 4, 2], block_size=4, max_new_tokens=300, min_entropy=4.0)
    assert (whole.tokens, whole.stopped_by, whole.nfe) == ([], "entropy", 256)


def test_no_prompt(model):
    """Check that without a prompt the first block is all masks and sees nothing before it."""
    sample = generate(model, [], block_size=4, max_new_tokens=8)
    assert (len(sample.tokens), sample.nfe, sample.cache_passes) == (8, 8, 1)


def pair_law(model, prompt, orders):
    """Return the probability of each pair of tokens; `orders` weighs the two orders, and () means both in one step."""
    expected = dict.fromkeys(itertools.product((2, 3, 4), repeat=2), 0.0)
    for outcome in expected:
        for order, weight in orders.items():
            probability, block = weight, [MASK, MASK]
            for place in order or (0, 1):
                probability *= math.exp(log_probability(model, prompt, block, place, outcome[place]))
                if order:
                    block[place] = outcome[place]
            expected[outcome] += probability
    assert sum(expected.values()) == pytest.approx(1, abs=1e-6)
    return expected


def chi_square(samples, expected):
    draws = len(samples)
    assert min(expected.values()) * draws > 5, "too rare"
    counts = dict.fromkeys(expected, 0)
    for sample in samples:
        counts[tuple(sample.tokens)] += 1
    return sum((counts[o] - draws * p) ** 2 / (draws * p) for o, p in expected.items())


@pytest.mark.parametrize("steps", [None, 1, 2, 4])
def test_text_is_drawn_from_the_enumerated_distribution(model, steps):
    """Check first hitting, which takes both orders of a block of two, and ancestral sampling, where both tokens come in
    one step in 1 of T cases; as T grows it becomes first hitting.
    """
    together = 1 / steps if steps else 0.0
    expected = pair_law(model, [2, 4], {(0, 1): (1 - together) / 2, (1, 0): (1 - together) / 2, (): together})
    how = {"block_size": 2, "max_new_tokens": 2, "temperature": FLAT}
    how |= {"unmasking": "ancestral", "steps": steps} if steps else {}
    samples = generate_batch(model, [[2, 4]] * 2000, **how)
    assert chi_square(samples, expected) < 26.1  # 8 degrees of freedom, one in a thousand
    once = sum(sample.nfe == 1 for sample in samples)  # idle steps cost no pass
    assert abs(once - 2000 * together) <= 4 * (2000 * together) ** 0.5
    other = pair_law(model, [2, 4], {(0, 1): 0.5, (1, 0): 0.5} if together else {(): 1.0})
    if together in (0.0, 1.0):
        assert chi_square(samples, other) > 26.1, "the two laws can be told apart"


def test_every_place_of_a_block_is_unmasked_first_equally_often(model, monkeypatch):
    """Check that first hitting unmasks positions in random order, in the blocks that the model is given."""
    shown = []
    decode = model.decode

    def observed(block, positions, cache, wanted):
        shown.append(block[0].tolist())
        return decode(block, positions, cache, wanted)

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
    model.prefill(clean, torch.arange(2)[None], cache)
    logits = model.decode(torch.tensor([block]), torch.tensor([[2, 3]]), cache)
    return float((logits[0, place].double() / FLAT).log_softmax(0)[token])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": [5]}, r"ids \[5\] that are not in this vocabulary of 5"),
        ({"prompt": [-1]}, "not in this vocabulary"),
        ({"prompt": [2], "top_k": 0}, "top_k is 0"),
        ({"prompt": [2], "top_p": 0.0}, "top_p is 0.0"),
        ({"prompt": [2], "top_p": 1.1}, "top_p is 1.1"),
        ({"prompt": [2], "window": 4}, "window is 4: give a multiple of the block size 4, twice that or more"),
        ({"prompt": [2], "window": 9}, "window is 9"),
        ({"prompt": [2], "max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"prompt": [2], "temperature": -1.0}, "temperature is -1.0"),
    ],
)
def test_bad_input(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(model, **{"block_size": 4, "max_new_tokens": 4} | arguments)


RULES = {
    "first-hitting": {},
    "ancestral": {"unmasking": "ancestral", "steps": 3},
    "static": {"unmasking": "static", "steps": 2},
    "dynamic": {"unmasking": "dynamic", "threshold": 0.5},
    "entropy": {"unmasking": "entropy", "threshold": 0.8},
}
PROMPTS = [[], [2], [2, 3, 4, 2], [3, 3, 3, 3, 3, 3], [4, 2, 3, 4, 2, 3, 4, 2, 3]]


@pytest.mark.parametrize("rule", RULES)
def test_a_batch_gives_what_its_members_give_alone(model, rule):
    """Check different prompts and ends: some texts stop at EOS early and leave the batch."""
    how = {"block_size": 4, "max_new_tokens": 18, "top_p": 0.95, "temperature": 1.3, **RULES[rule]}
    model.output_layer.bias[VOCABULARY.eos_id] = 2.0
    try:
        together = generate_batch(model, PROMPTS * 2, **how)
        alone = [generate(model, prompt, seed=seed, **how) for seed, prompt in enumerate(PROMPTS * 2)]
    finally:
        model.output_layer.bias[VOCABULARY.eos_id] = -300.0
    assert together == alone
    assert len({sample.stopped_by for sample in together}) == 2
    assert len({len(sample.tokens) for sample in together}) > 1


def test_the_nucleus_and_the_most_likely_are_those_of_brute_force():
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(1))
    logits[:, 4] = float("-inf")
    for top_k, top_p in itertools.product((None, 1, 3), (1.0, 0.9, 0.5, 1e-9)):
        found = Drawing(0.7, top_k, top_p).distribution(logits)
        for row, values in zip(found, (logits.double() / 0.7).softmax(-1), strict=True):
            ranked = sorted(range(9), key=lambda i: (-values[i], i))[:top_k]
            total, kept = sum(values[ranked]), []
            for token in ranked:
                kept.append(token)
                if sum(values[kept]) / total >= top_p:
                    break
            expected = torch.zeros(9).double()
            expected[kept] = values[kept] / sum(values[kept])
            torch.testing.assert_close(row, expected)
    assert Drawing(0.0, None, 0.5).draw(logits, torch.zeros(50))[0].tolist() == logits.argmax(-1).tolist()


def test_gaps_are_filled_in_place_and_nothing_else_changes(model):
    """Check that the last gap's block sees the text after it, and that a limit of 0 only fills gaps."""
    prompt = [2, 3, 4, 2, 3, MASK, MASK, 4, 2, MASK, 3]
    for rule in RULES.values():
        filled = generate(model, prompt, block_size=4, max_new_tokens=0, **rule)
        assert (filled.tokens, filled.stopped_by, len(filled.prompt)) == ([], "length", len(prompt))
        assert MASK not in filled.prompt
        assert [a for a, b in zip(filled.prompt, prompt, strict=True) if b != MASK] == [t for t in prompt if t != MASK]
        on = generate(model, prompt, block_size=4, max_new_tokens=5, **rule)
        assert on.prompt[:8] == filled.prompt[:8]
        assert len(on.tokens) == 5
    clean = generate(model, [2, 3, 4, 2, 3], block_size=4, max_new_tokens=3, seed=4)
    assert clean.prompt == [2, 3, 4, 2, 3]
    with pytest.raises(ValueError, match="max_new_tokens is 0: give at least 1, or a prompt with gaps"):
        generate(model, [2], block_size=4, max_new_tokens=0)


def test_a_gap_sees_its_whole_block(model):
    """Check one token between two others: it is drawn from the model's distribution for the masked block."""
    log_law = [log_probability(model, [2, 4], [MASK, 3], 0, token) for token in (2, 3, 4)]
    draws = 300
    how = {"block_size": 2, "max_new_tokens": 0, "temperature": FLAT}
    samples = generate_batch(model, [[2, 4, MASK, 3]] * draws, **how)
    counts = [sum(sample.prompt[2] == token for sample in samples) for token in (2, 3, 4)]
    expected = [draws * math.exp(value) for value in log_law]
    assert sum(expected) == pytest.approx(draws, rel=1e-5)
    assert sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True)) < 13.9  # 2 degrees of freedom


@pytest.mark.parametrize("prompt", [[2, 3], [2, 3, 4, 2, 3, 4, 2, 3, 4, 3, 3, 2, 4, 4]])
def test_a_window_is_all_that_a_block_sees(model, prompt):
    """Compare with a greedy model of one layer that forgets; its keys depend on no earlier tokens."""
    how = {"block_size": 4, "temperature": 0, "unmasking": "static"}
    found = generate(model, prompt, max_new_tokens=30, window=12, **how)
    text = list(prompt)
    while len(text) < len(prompt) + 30:
        whole = len(text) // 4 * 4
        start = max(0, whole - 8)
        rest = generate(model, text[start:], max_new_tokens=4 - len(text) % 4, **how)
        text += rest.tokens
    assert found.tokens == text[len(prompt) :][:30]
    assert found.tokens != generate(model, prompt, max_new_tokens=30, **how).tokens
    wide = generate(model, prompt, max_new_tokens=30, window=64, **how)
    assert wide.tokens == generate(model, prompt, max_new_tokens=30, **how).tokens


def test_texts_end_where_they_are_told_to(model):
    """Check that each text ends at its second 3, which `ends` reports after a block."""

    def ends(index, tokens):
        assert index in range(5)
        places = [i for i, token in enumerate(tokens) if token == 3]
        return places[1] if len(places) > 1 else None

    how = {"block_size": 4, "max_new_tokens": 40}
    samples = generate_batch(model, PROMPTS, ends=ends, **how)
    whole = generate_batch(model, PROMPTS, **how)
    assert {sample.stopped_by for sample in samples} == {"stop string"}
    for sample, text in zip(samples, whole, strict=True):
        assert sample.tokens == text.tokens[: ends(0, text.tokens)]


def test_what_is_yielded_goes_from_masks_to_the_text(model):
    """Check that unfinished texts are yielded before the first pass and after each, and that blocks end in order."""
    seen, finished, counts = {0: [], 1: []}, {0: [], 1: []}, []
    sampling = SamplingConfig(max_new_tokens=7)
    requests = [Request(prompt, sampling, seed, (0,)) for seed, prompt in ((1, [2]), (2, [3, 4]))]
    for drafts in denoise(model, requests, block_size=4):
        counts.append([draft.generated for draft in drafts])
        for draft in drafts:
            seen[draft.index].append(draft.whole)
            finished[draft.index] += [draft.whole] if draft.finished else []
    alone = [generate(model, [2], block_size=4, max_new_tokens=7, seed=1)]
    alone += [generate(model, [3, 4], block_size=4, max_new_tokens=7, seed=2)]
    for texts, blocks, sample in zip(seen.values(), finished.values(), alone, strict=True):
        assert texts[0] == sample.prompt + [MASK] * (4 - len(sample.prompt))
        for before, after in itertools.pairwise(texts):
            assert all(b in (a, MASK) for a, b in zip(after, before, strict=False))
        assert blocks == [texts[-1][: 4 * n + 4] for n in range(len(texts[-1]) // 4)]
        assert texts[-1][: len(sample.prompt) + 7] == sample.prompt + sample.tokens
    assert (counts[0], counts[-1]) == ([0, 0], [7])


def test_texts_may_be_written_by_turns(model):
    how = {"block_size": 4, "max_new_tokens": 20}
    passes = denoise(model, [Request([2], SamplingConfig(max_new_tokens=20), 0, (0,))], block_size=4)
    for _ in range(3):
        next(passes)
    assert torch.is_grad_enabled()
    between = generate(model, [2], **how)
    assert [drafts[0].sample for drafts in passes][-1] == between == generate(model, [2], **how)
