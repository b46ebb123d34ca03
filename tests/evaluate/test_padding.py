"""Tokens that pad a document are neither counted nor seen: what they are changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bd3_scale.data.batch import Batch
from bd3_scale.evaluate.nelbo import evaluate_nelbo
from bd3_scale.recipe.schema import DiffusionRecipe
from bd3_scale.recipe.vocabulary import Vocabulary

LENGTH, TEXT = 16, 9
VOCABULARY = Vocabulary(size=12, eos_id=0, mask_id=11)


@pytest.fixture(scope="module")
def model(random_model):
    return random_model(VOCABULARY, block_size=8, length=LENGTH, seed=3, num_layers=1, hidden_size=16, init_std=0.5)


def batch(padding: int) -> Batch:
    """Twenty texts of nine tokens, the last of which shares a block of 8 with `padding`."""
    tokens = torch.randint(1, 11, (20, LENGTH), generator=torch.Generator().manual_seed(1))
    tokens[:, TEXT:] = padding
    place = torch.arange(LENGTH).expand(20, -1)
    start = torch.zeros(20, LENGTH, dtype=torch.int32)
    shown = torch.zeros_like(tokens).bool()
    return Batch(torch.arange(20), torch.arange(20), 0, tokens, start, place, place < TEXT, shown)


@pytest.mark.parametrize("block_size", [1, 8])
def test_what_pads_a_document_is_not_seen(groups, model, block_size):
    how = {"diffusion": DiffusionRecipe(block_size=block_size), "draws": 3}
    ends, others = (evaluate_nelbo([model], [batch(padding)], groups, **how) for padding in (0, 7))
    assert ends.nelbo == others.nelbo
    assert torch.equal(ends.moments, others.moments)
    shown = evaluate_nelbo(
        [model], [replace(batch(0), counted=torch.ones(20, LENGTH, dtype=torch.bool))], groups, **how
    )
    assert shown.nelbo.nelbo != ends.nelbo.nelbo
    assert ends.nelbo.num_tokens == 20 * TEXT
