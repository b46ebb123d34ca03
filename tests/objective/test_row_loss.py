"""Check that an objective may use any function of the nll and the logits' total, with its gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bd3_scale.model import head
from bd3_scale.model.config import transformer_config
from bd3_scale.model.head import OutputLayer
from bd3_scale.recipe.schema import ModelRecipe, ParallelRecipe
from bd3_scale.recipe.vocabulary import Vocabulary

HIDDEN, ROWS = 16, 11
VOCABULARY = Vocabulary(size=300, eos_id=0, mask_id=57)


def focal(nll, log_total):
    """Return the focal loss of Lin et al., ICCV 2017, with gamma 2."""
    return (1 - (-nll).exp()) ** 2 * nll


def z_loss(nll, log_total):
    """Return the cross-entropy and a small square of the logits' total (Chowdhery et al., 2022)."""
    return nll + 1e-2 * log_total.square()


@pytest.fixture
def layer(groups):
    model = ModelRecipe(num_layers=1, hidden_size=HIDDEN, num_attention_heads=2, ffn_hidden_size=8, head_bias=True)
    config = transformer_config(
        model, ParallelRecipe(), dtype=torch.float32, device=torch.device("cpu"), deterministic=True
    )
    built = OutputLayer(model, VOCABULARY, config, groups.tp)
    for parameter in built.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    return built


@pytest.mark.parametrize("loss", [focal, z_loss])
def test_gradients_are_those_of_all_logits_at_once(layer, monkeypatch, loss):
    monkeypatch.setattr(head, "PIECE_BYTES", 4 * 3 * VOCABULARY.padded_size)  # four pieces
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator, requires_grad=True)
    targets = torch.randint(58, 300, (ROWS,), generator=generator)
    weights = torch.rand(ROWS, generator=generator)

    logits = F.linear(hidden, layer.weight, layer.bias).double()
    allowed = torch.arange(VOCABULARY.padded_size).ne(57) & (torch.arange(VOCABULARY.padded_size) < 300)
    logits = logits.masked_fill(~allowed, float("-inf"))
    total = logits.logsumexp(1)
    expected = loss(total - logits.gather(1, targets[:, None])[:, 0], total)
    wanted = torch.autograd.grad((expected * weights).sum(), [hidden, layer.weight, layer.bias])

    summed, each = layer(hidden, None, targets, weights, loss)
    found = torch.autograd.grad(summed, [hidden, layer.weight, layer.bias])
    torch.testing.assert_close(each.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_loss_of_the_wrong_shape_is_refused(layer):
    rows = torch.zeros(ROWS, HIDDEN), None, torch.full((ROWS,), 60), torch.ones(ROWS)
    with pytest.raises(ValueError, match="a row loss gives shape \\(\\) for 11 rows: return one number for each row"):
        layer(*rows, lambda nll, log_total: nll.sum())
