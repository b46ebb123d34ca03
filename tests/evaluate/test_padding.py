"""Check that tokens that pad a document are neither counted nor seen: their ids change no result."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, permutations
from math import log

import pytest
import torch

from bd3_scale.attention.spans import make_spans
from bd3_scale.data.batch import Batch
from bd3_scale.evaluate.nelbo import evaluate_nelbo
from bd3_scale.objective import BlockDiffusion
from bd3_scale.recipe.schema import DiffusionRecipe
from bd3_scale.recipe.vocabulary import Vocabulary

LENGTH, TEXT = 16, 9
VOCABULARY = Vocabulary(size=12, eos_id=0, mask_id=11)


@pytest.fixture(scope="module")
def model(random_model):
    return random_model(VOCABULARY, seed=3, num_layers=1, hidden_size=16, init_std=0.5)


def batch(padding: int) -> Batch:
    """Return twenty texts of nine tokens, the last of which shares a block of 8 with `padding`."""
    tokens = torch.randint(1, 11, (20, LENGTH), generator=torch.Generator().manual_seed(1))
    tokens[:, TEXT:] = padding
    place, ids = torch.arange(LENGTH).expand(20, -1), torch.arange(20)
    start = torch.zeros(20, LENGTH, dtype=torch.int32)
    shown = torch.zeros_like(tokens).bool()
    return Batch(ids, ids, 0 * ids, 0 * ids, tokens, start, place, place < TEXT, shown)


@pytest.mark.parametrize("block_size", [1, 8])
def test_what_pads_a_document_is_not_seen(groups, model, block_size):
    how = {"objective": BlockDiffusion(DiffusionRecipe(block_size=block_size), VOCABULARY), "draws": 3}
    ends, others = (evaluate_nelbo([model], [batch(padding)], groups, **how) for padding in (0, 7))
    assert ends.nelbo == others.nelbo
    assert torch.equal(ends.moments, others.moments)
    shown = evaluate_nelbo(
        [model], [replace(batch(0), counted=torch.ones(20, LENGTH, dtype=torch.bool))], groups, **how
    )
    assert shown.nelbo.nelbo != ends.nelbo.nelbo
    assert ends.nelbo.num_tokens == 20 * TEXT


def block_law(model, prefix: list[int], block: list[int | None]) -> float:
    """Return the probability that blocks of three, unmasked one token at a time in random order, give `block` (None:
    any token), by enumeration of orders and tokens.
    """
    known = [i for i in range(VOCABULARY.size) if i != VOCABULARY.mask_id]
    memory: dict[tuple[int, ...], torch.Tensor] = {}

    def law(tokens: tuple[int, ...]) -> torch.Tensor:
        if tokens not in memory:
            row = torch.tensor([[*prefix, *tokens]])
            spans = make_spans(torch.zeros(row.shape, dtype=torch.int32), 3)
            logits = model.clean_logits(row, torch.arange(row.shape[1])[None], spans)[
                0, -3:, : VOCABULARY.size
            ].double()
            logits[:, VOCABULARY.mask_id] = -torch.inf
            memory[tokens] = logits.double().softmax(-1)
        return memory[tokens]

    def given(tokens: tuple[int, ...], order: tuple[int, ...]) -> float:
        if not order:
            return 1.0
        place, rest = order[0], order[1:]
        total = 0.0
        for token in known if block[place] is None else [block[place]]:
            after = (*tokens[:place], token, *tokens[place + 1 :])
            total += float(law(tokens)[place, token]) * given(after, rest)
        return total

    orders = list(permutations(range(3)))
    return sum(given((VOCABULARY.mask_id,) * 3, order) for order in orders) / len(orders)


@torch.no_grad()
def test_with_its_padding_counted_the_number_bounds_what_generate_writes(groups, random_model):
    """Check texts of four tokens and EOS in blocks of three: the second block is a token, the end and padding."""
    small = random_model(VOCABULARY, seed=5, num_layers=1, hidden_size=16, init_std=0.7)
    text = [3, 7, 1, 5, VOCABULARY.eos_id]
    exact = -log(block_law(small, [], text[:3])) - log(block_law(small, text[:3], [*text[3:], None]))
    tokens = torch.tensor([[*text, VOCABULARY.eos_id]]).expand(400, -1)
    place, ids = torch.arange(6).expand(400, -1), torch.arange(400)
    rows = torch.zeros(400, 6, dtype=torch.int32)
    one = Batch(ids, ids, 0 * ids, 0 * ids, tokens, rows, place, place < 5, torch.zeros(400, 6, dtype=torch.bool))
    how = {"objective": BlockDiffusion(DiffusionRecipe(block_size=3), VOCABULARY), "draws": 8, "padded": True}
    found = evaluate_nelbo([small], [one], groups, **how)
    bound, error = found.padded.nelbo * 5, found.padded.noise_standard_error * 5
    assert bound + 4 * error > exact
    assert found.padded.nelbo != found.nelbo.nelbo
    # The same bound from the model's own answers, over all sets of masks: sum over k of 1/k of those with k masks.
    whole = 0.0
    for prefix, block in (([], text[:3]), (text[:3], [*text[3:], VOCABULARY.eos_id])):
        for count in range(1, 4):
            sets = list(combinations(range(3), count))
            for masked in sets:
                shown = [VOCABULARY.mask_id if i in masked else token for i, token in enumerate(block)]
                row = torch.tensor([[*prefix, *shown]])
                spans = make_spans(torch.zeros(row.shape, dtype=torch.int32), 3)
                logits = small.clean_logits(row, torch.arange(row.shape[1])[None], spans)[0, -3:, : VOCABULARY.size]
                logits[:, VOCABULARY.mask_id] = -torch.inf
                nll = -logits.double().log_softmax(-1)
                whole += sum(float(nll[i, block[i]]) for i in masked) / count / len(sets)
    assert bound == pytest.approx(whole, abs=5 * error)
    assert whole > exact


def test_a_text_without_padding_has_one_number_and_what_is_shown_is_seen(groups, model):
    full = replace(batch(0), counted=torch.ones(20, LENGTH, dtype=torch.bool))
    # With one block, a token could only see its own noisy copy.
    how = {"objective": BlockDiffusion(DiffusionRecipe(block_size=LENGTH), VOCABULARY), "draws": 2, "padded": True}
    found = evaluate_nelbo([model], [full], groups, **how)
    assert found.padded == found.nelbo
    shown = torch.zeros(20, LENGTH, dtype=torch.bool)
    shown[:, 0] = True
    other = full.tokens.clone()
    other[:, 0] = torch.where(other[:, 0] == 3, 4, 3)
    begins = [replace(full, tokens=t, shown=shown, counted=~shown) for t in (full.tokens, other)]
    first, second = (evaluate_nelbo([model], [one], groups, **how).nelbo for one in begins)
    assert first.num_tokens == 20 * (LENGTH - 1)
    assert first.nelbo != second.nelbo


def test_padding_behind_the_last_block_with_text_is_no_part_of_either_number(groups, model):
    """Check nine tokens in blocks of four: three tokens of the third block and all of the fourth are padding."""
    ends, others = batch(0), batch(0)
    others.tokens[:, 12:] = 7
    how = {"objective": BlockDiffusion(DiffusionRecipe(block_size=4), VOCABULARY), "draws": 2, "padded": True}
    found, same = (evaluate_nelbo([model], [one], groups, **how) for one in (ends, others))
    assert (found.nelbo, found.padded) == (same.nelbo, same.padded)
    others.tokens[:, 10] = 7
    assert evaluate_nelbo([model], [others], groups, **how).padded != found.padded
