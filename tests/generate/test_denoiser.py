"""Check texts that join and leave a batch: each is the same as alone, whatever the others do."""

from __future__ import annotations

import math
import random

import pytest
import torch

from bd3_scale.generate import denoiser as module
from bd3_scale.generate.config import SamplingConfig
from bd3_scale.generate.denoiser import Denoiser
from bd3_scale.generate.draft import Draft, Request, Sample
from bd3_scale.generate.sampler import generate
from bd3_scale.model.build import build_model
from bd3_scale.recipe.schema import ModelRecipe
from bd3_scale.recipe.vocabulary import Vocabulary
from tests.generate.test_sampler import RULES

MASK, SIZE, CAPACITY = 1, 4, 64
VOCABULARY = Vocabulary(size=12, eos_id=0, mask_id=MASK)


@pytest.fixture(scope="module")
def model(groups):
    shape = ModelRecipe(num_layers=2, hidden_size=16, num_attention_heads=2, ffn_hidden_size=16, init_std=0.6)
    (built,) = build_model(shape, VOCABULARY, groups, dtype=torch.float32, device=torch.device("cpu"), seed=2)
    return built.requires_grad_(False)


def requests() -> list[Request]:
    rng, found = random.Random(0), []
    for seed, (how, temperature) in enumerate((how, t) for how in RULES.values() for t in (0.0, 1.0, 1.4)):
        prompt = [rng.randrange(2, 12) for _ in range(rng.choice([0, 3, 4, 9, 21, 38]))]
        sampling = SamplingConfig(max_new_tokens=rng.randint(3, 14), temperature=temperature, **how)
        found.append(Request(prompt, sampling, seed, (0, 5), rng.choice([None, None, 8, 16])))
    return found


def alone(model, request: Request) -> Sample:
    return generate(
        model,
        list(request.prompt),
        SamplingConfig(**{**vars(request.sampling), "seed": request.seed}),
        block_size=SIZE,
        window=request.window,
        eos_ids=request.eos_ids,
    )


@pytest.mark.parametrize(
    ("rows", "slots"),
    [
        pytest.param(
            rows, slots, marks=[] if (rows, slots) in [(SIZE, 1), (3 * SIZE, 3), (256, 6)] else pytest.mark.slow
        )
        for rows in (SIZE, 3 * SIZE, 256)
        for slots in (1, 3, 6)
    ],
)
def test_texts_that_come_and_go_are_what_they_are_alone(model, monkeypatch, rows, slots):
    """Check prompts of up to nine blocks, which are read one, three or all at a time while others are denoised."""
    expected = [alone(model, request) for request in requests()]
    monkeypatch.setattr(module, "_PREFILL_TOKENS", {"cpu": rows})
    denoiser, rng, found, sizes = (
        Denoiser(model, block_size=SIZE, slots=slots, capacity=CAPACITY),
        random.Random(1),
        {},
        set(),
    )
    waiting = [Draft.of(index, request, SIZE, MASK) for index, request in enumerate(requests())]
    while len(found) < len(expected):
        while waiting and denoiser.free and rng.random() < 0.6:
            denoiser.join(waiting.pop(0))
        if denoiser.reads:
            denoiser.read(briefly=rng.random() < 0.5)
        if any(draft.sample is None for draft in denoiser.active):
            denoiser.advance()
        sizes.add(len(denoiser.active))
        ended = [draft for draft in denoiser.active if draft.sample is not None]
        found |= {draft.index: draft.sample for draft in ended}
        denoiser.leave(ended)
    for index, sample in enumerate(expected):
        got = found[index]
        assert (got.tokens, got.prompt, got.stopped_by, got.nfe) == (
            sample.tokens, sample.prompt, sample.stopped_by, sample.nfe,
        )  # fmt: skip
    assert max(sizes) >= min(slots, 3)
    assert {sample.stopped_by for sample in found.values()} == {"eos", "length"}


def test_a_text_that_leaves_early_frees_its_place_and_changes_nothing(model):
    first, second, third = requests()[6:9]
    denoiser = Denoiser(model, block_size=SIZE, slots=2, capacity=CAPACITY)
    drafts = [Draft.of(i, request, SIZE, MASK) for i, request in enumerate((first, second, third))]
    for draft in drafts[:2]:
        denoiser.join(draft)
    assert denoiser.free == 0
    denoiser.leave(drafts[:1])  # perhaps before its prompt is read
    denoiser.join(drafts[2])
    while denoiser.reads:
        denoiser.read()
    while going := [draft for draft in denoiser.active if draft.sample is None]:
        denoiser.advance()
        denoiser.leave([draft for draft in going if draft.sample is not None])
    for draft, request in zip(drafts[1:], (second, third), strict=True):
        assert draft.sample is not None
        assert draft.sample.tokens == alone(model, request).tokens
    assert denoiser.free == 2


@pytest.mark.parametrize("rule", ["first-hitting", "static"])
def test_likelihoods_are_those_of_the_pass_that_took_a_token(model, rule):
    """Check that temperature 0.5 does not change the likelihoods, which are the model's for the block at that pass."""
    sampling = SamplingConfig(max_new_tokens=8, temperature=0.5, top_k=3, unmasking=rule)
    request = Request([2, 3, 4, 5, 6], sampling, 3, (0,), alternatives=2)
    draft = Draft.of(0, request, SIZE, MASK)
    denoiser = Denoiser(model, block_size=SIZE, slots=1, capacity=CAPACITY)
    denoiser.join(draft)
    denoiser.read()
    while draft.sample is None:
        before, tokens, masked = draft.block.copy(), list(draft.tokens), (draft.block == MASK).any()
        denoiser.advance()
        if not masked:
            continue
        cache = model.new_cache(1, CAPACITY)
        for start in range(0, len(tokens), SIZE):
            place = torch.arange(start, start + SIZE)[None]
            model.prefill(torch.tensor([tokens[start : start + SIZE]]), place, cache)
        positions = torch.arange(len(tokens), len(tokens) + SIZE)[None]
        logs = model.decode(torch.from_numpy(before)[None], positions, cache)[0].double().log_softmax(-1)
        for place in range(SIZE):
            if before[place] == MASK and draft.block[place] != MASK:
                found = draft.likelihoods[len(tokens) + place]
                assert found.log_probability == pytest.approx(float(logs[place, draft.block[place]]), abs=1e-5)
                values, ids = logs[place].topk(2)
                assert [i for i, _ in found.most_likely] == ids.tolist()
                assert [v for _, v in found.most_likely] == pytest.approx(values.tolist(), abs=1e-5)
    assert sorted(draft.likelihoods) == list(range(5, 16))


def test_the_most_likely_are_clean_tokens(model):
    """Check a small vocabulary: the mask, whose −∞ JSON cannot hold, is not listed."""
    request = Request([2], SamplingConfig(max_new_tokens=3), 3, (), alternatives=20)
    draft = Draft.of(0, request, SIZE, MASK)
    denoiser = Denoiser(model, block_size=SIZE, slots=1, capacity=CAPACITY)
    denoiser.join(draft)
    while draft.sample is None:
        denoiser.advance()
    for found in draft.likelihoods.values():
        assert sorted(i for i, _ in found.most_likely) == [i for i in range(12) if i != MASK]
        assert sum(math.exp(value) for _, value in found.most_likely) == pytest.approx(1)
