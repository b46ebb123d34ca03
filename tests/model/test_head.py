"""Compare the head's loss and gradients with log_softmax of all logits at once, and check the memory it keeps."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from bd3_scale.model import head
from bd3_scale.model.config import transformer_config
from bd3_scale.model.head import OutputLayer
from bd3_scale.objective import ScoreEntropy
from bd3_scale.parallel.groups import process_groups
from bd3_scale.recipe.schema import DiffusionRecipe, ModelRecipe, ParallelRecipe
from bd3_scale.recipe.vocabulary import Vocabulary
from tests.support.forks import run_ranks

HIDDEN = 16
VOCABULARY = Vocabulary(size=300, eos_id=0, mask_id=57)
FORBIDDEN = [57, *range(300, 384)]


WHOLE = ParallelRecipe()
SCORE_ENTROPY = ScoreEntropy(DiffusionRecipe(block_size=1), VOCABULARY).row_loss


def output_layer(groups, parallel=WHOLE, *, vocabulary=VOCABULARY, bias=True, tied=False, dtype=torch.float32):
    cpu = torch.device("cpu")
    shape = {"num_layers": 1, "hidden_size": HIDDEN, "num_attention_heads": 2, "ffn_hidden_size": 8}
    model = ModelRecipe.model_validate(shape | {"head_bias": bias})
    config = transformer_config(model, parallel, dtype=dtype, device=cpu, deterministic=True)
    return OutputLayer(model, vocabulary, config, groups.tp, owns_weight=not tied)


@pytest.fixture
def build(groups):
    """Return a function that builds an output layer of random weights; `tied` ones have no weight of their own."""

    def make(*, bias=True, tied=False):
        layer = output_layer(groups, bias=bias, tied=tied)
        generator = torch.Generator().manual_seed(0)
        for parameter in layer.parameters():
            parameter.data.normal_(generator=generator)
        return layer

    return make


def rows_of(num_rows):
    """Draw hidden rows, targets that a text may contain, and weights of which some are zero."""
    generator = torch.Generator().manual_seed(num_rows)
    hidden = torch.randn(num_rows, HIDDEN, generator=generator, requires_grad=True)
    allowed = torch.tensor([i for i in range(384) if i not in FORBIDDEN])
    targets = allowed[torch.randint(0, len(allowed), (num_rows,), generator=generator)]
    weights = torch.rand(num_rows, generator=generator) * 5
    weights[::4] = 0
    return hidden, targets, weights


def plain_loss(hidden, weight, bias, targets, weights):
    logits = torch.nn.functional.linear(hidden, weight, bias).clone()
    logits[:, FORBIDDEN] = float("-inf")
    nll = -logits.log_softmax(-1)[torch.arange(len(targets)), targets]
    return (nll * weights).sum(), nll


class NewTensors(TorchDispatchMode):
    """A count of the elements of each piece of memory that is allocated meanwhile."""

    def __init__(self, *known):
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.elements = [0]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.elements.append(x.untyped_storage().nbytes() // 4)
        return made


@pytest.mark.parametrize("rows_a_piece", [1, 5, 20, None])
@pytest.mark.parametrize("num_rows", [0, 1, 20, 23])
@pytest.mark.parametrize(("bias", "tied"), [(True, False), (False, True)])
def test_loss_and_gradients_are_those_of_all_logits_at_once(monkeypatch, build, rows_a_piece, num_rows, bias, tied):
    if rows_a_piece is not None:
        # This size is no multiple of a row; a piece still consists of whole rows.
        monkeypatch.setattr(head, "PIECE_BYTES", 4 * (rows_a_piece * 384 + 100))
    layer = build(bias=bias, tied=tied)
    hidden, targets, weights = rows_of(num_rows)
    weight = torch.linspace(-2, 2, 384 * HIDDEN).sin().view(384, HIDDEN).requires_grad_() if tied else layer.weight
    leaves = [hidden, weight, *([layer.bias] if bias else [])]
    expected, expected_nll = plain_loss(hidden, weight, layer.bias, targets, weights)
    expected_gradients = torch.autograd.grad(expected * 3, leaves)
    total, nll = layer(hidden, weight if tied else None, targets, weights)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(nll, expected_nll.detach(), rtol=1e-5, atol=1e-5)
    assert not nll.requires_grad
    for gradient, expected_gradient in zip(torch.autograd.grad(total * 3, leaves), expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-4)


def test_rows_without_weight_have_no_gradient(build):
    layer = build()
    hidden, targets, weights = rows_of(8)
    total, nll = layer(hidden, None, targets, torch.zeros_like(weights))
    total.backward()
    assert total == 0
    assert (nll > 0).all()
    for leaf in (hidden, layer.weight, layer.bias):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_a_tiny_piece_is_still_one_row(monkeypatch, build):
    monkeypatch.setattr(head, "PIECE_BYTES", 1)
    hidden, targets, weights = rows_of(3)
    layer = build()
    assert torch.isclose(
        layer(hidden, None, targets, weights)[0], plain_loss(hidden, layer.weight, layer.bias, targets, weights)[0]
    )


def test_logits_are_those_of_the_loss_and_forbid_what_no_text_holds(build):
    layer = build()
    hidden, targets, weights = rows_of(6)
    logits = layer(hidden.view(2, 3, HIDDEN))
    assert (logits[..., FORBIDDEN] == float("-inf")).all()
    nll = -logits.flatten(0, 1).log_softmax(-1)[torch.arange(6), targets]
    torch.testing.assert_close(layer(hidden, None, targets, weights)[1], nll.detach(), rtol=1e-5, atol=1e-5)


def test_no_more_than_a_pieces_logits_and_the_gradients_ever_exist(monkeypatch, build):
    monkeypatch.setattr(head, "PIECE_BYTES", 4 * 4 * 384)
    layer = build()
    hidden, targets, weights = rows_of(1000)
    with NewTensors(hidden, layer.weight, layer.bias, targets, weights) as during:
        total, _ = layer(hidden, None, targets, weights)
        total.backward()
    assert max(during.elements) == hidden.numel() == 1000 * HIDDEN < 1000 * 384
    assert during.elements.count(4 * 384) >= 1000 // 4


def test_without_gradients_nothing_is_kept(monkeypatch, build):
    """Check the memory that is allocated: no gradient of the rows and none of the weights."""
    monkeypatch.setattr(head, "PIECE_BYTES", 4 * 2 * 384)
    layer = build()
    hidden, targets, weights = rows_of(1000)
    with torch.no_grad(), NewTensors(hidden, layer.weight, layer.bias, targets, weights) as during:
        total, nll = layer(hidden, None, targets, weights)
    assert total.grad_fn is None
    assert nll.grad_fn is None
    assert max(during.elements) == 1000 < layer.weight.numel() < hidden.numel()
    torch.testing.assert_close(total, layer(hidden, None, targets, weights)[0].detach())


def test_score_entropy_is_that_of_the_paper(build, monkeypatch) -> None:
    """Compare with SEDD's loss of absorbing noise and its gradients, by its definition over ratios of probabilities.

    Lou et al., ICML 2024, definition 3.1: the sum over y of w (s(y) - r log s(y) + K(r)), K(r) = r (log r - 1), where
    r = p(y) / p(mask) given the clean token is `ratio` for that token and 0 for others; w dt is sigma' dt.
    """
    monkeypatch.setattr(head, "PIECE_BYTES", 4 * 3 * 384)
    layer = build()
    hidden, targets, _ = rows_of(10)
    rate = torch.linspace(0.1, 0.95, 10)
    sigma_slope, ratio = 1 / (1 - rate), (1 - rate) / rate  # of log-linear noise: sigma = -log(1 - t)
    logits = torch.nn.functional.linear(hidden, layer.weight, layer.bias)
    allowed = [i for i in range(300) if i != 57]
    scores = ratio[:, None] * logits[:, allowed].exp() / len(allowed)
    at = torch.tensor([allowed.index(t) for t in targets.tolist()])
    own = scores.gather(1, at[:, None])[:, 0]
    expected = sigma_slope * (scores.sum(1) - ratio * own.log() + ratio * (ratio.log() - 1))
    wanted = torch.autograd.grad(expected.sum(), [hidden, layer.weight, layer.bias])
    total, each = layer(hidden, None, targets, sigma_slope * ratio, SCORE_ENTROPY)
    found = torch.autograd.grad(total, [hidden, layer.weight, layer.bias])
    torch.testing.assert_close(each * sigma_slope * ratio, expected.detach(), rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_score_entropy_is_least_at_the_probabilities(build) -> None:
    """Check that, over the targets' distribution, the least value is at the probabilities and is their entropy."""
    layer = build(bias=True)
    layer.weight.data.zero_()
    allowed = [i for i in range(300) if i != 57]
    law = torch.rand(len(allowed), generator=torch.Generator().manual_seed(3)).double() + 0.01
    law /= law.sum()
    entropy = -(law * law.log()).sum().item()
    targets, hidden = torch.tensor(allowed), torch.zeros(len(allowed), HIDDEN)

    def expected(scores):
        layer.bias.data[allowed] = (scores * len(allowed)).log().float()
        return (layer(hidden, None, targets, torch.ones(len(allowed)), SCORE_ENTROPY)[1].double() * law).sum().item()

    assert expected(law) == pytest.approx(entropy, rel=1e-5)
    assert expected(law * 1.3) == pytest.approx(entropy + 0.3 - math.log(1.3), rel=1e-5)
    assert expected(torch.full_like(law, 1 / len(law))) > entropy + 0.05
    # Unlike this loss, the cross-entropy would not depend on the scale.
    assert expected(law * 0.7) > entropy + 0.05


def second_order(nll, log_total):
    """Return a user-defined loss that reads both arguments, with derivatives of either sign."""
    return nll.square() * 0.1 - 0.3 * log_total + nll


def check_whole_vocabulary(groups, parallel, vocabulary, dtype, row_loss, spread, seed) -> None:
    """Compare loss and gradients with torch's cross_entropy in float64 of the whole vocabulary's logits.

    spread: the distance of the ranks' logits; if it is large, one rank's exponentials vanish in the sum.
    """
    generator = torch.Generator().manual_seed(seed)
    layer = output_layer(groups, parallel, vocabulary=vocabulary, dtype=dtype)
    size, rank, ranks = vocabulary.padded_size, groups.tp.rank(), groups.tp.size()
    own = slice(rank * (size // ranks), (rank + 1) * (size // ranks))
    weight, hidden = (torch.randn(n, HIDDEN, generator=generator).to(dtype) for n in (size, 13))
    bias = (torch.randn(size, generator=generator) + torch.linspace(0, spread, size)).to(dtype)
    targets = torch.randint(0, vocabulary.size - 1, (13,), generator=generator)
    targets += targets >= vocabulary.mask_id
    weights = torch.randn(13, generator=generator)
    with torch.no_grad():
        layer.weight.copy_(weight[own])
        layer.bias.copy_(bias[own])
    mine = [hidden.clone().requires_grad_(), layer.weight, layer.bias]
    total, each = layer(mine[0], None, targets, weights, row_loss)
    found = list(torch.autograd.grad(total * 3, mine))
    dist.all_reduce(found[0], group=groups.tp)

    leaves = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    logits = torch.nn.functional.linear(*leaves)
    # The logits are rounded as a product in that dtype is; the 16-bit loss is computed from such logits.
    logits = logits + (logits.detach().to(dtype).double() - logits.detach())
    ids = torch.arange(size)
    logits = logits.masked_fill((ids == vocabulary.mask_id) | (ids >= vocabulary.size), float("-inf"))
    wanted = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    if row_loss is not None:
        wanted = row_loss(wanted, logits.logsumexp(1))
    expected = torch.autograd.grad((wanted * weights).sum() * 3, leaves)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(each.double(), wanted.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(total.detach().double(), (wanted.detach() * weights).sum(), rtol=tolerance, atol=1e-3)
    for got, want in zip(found, (expected[0], expected[1][own], expected[2][own]), strict=True):
        assert (got.double() - want).norm() <= tolerance * max(expected[0].norm(), want.norm())


# Of the second vocabulary, the second of two ranks holds no entry that a text may contain.
VOCABULARIES = (VOCABULARY, Vocabulary(size=60, eos_id=0, mask_id=57))


def check_every_form(groups, parallel) -> None:
    forms = [(torch.float32, spread) for spread in (0, 150, -150)] + [(torch.bfloat16, 0)]
    number = 0
    for vocabulary, row_loss in itertools.product(VOCABULARIES, (None, second_order)):
        for dtype, spread in forms:
            number += 1
            check_whole_vocabulary(groups, parallel, vocabulary, dtype, row_loss, spread, number)


def test_it_is_the_cross_entropy_of_the_whole_vocabulary(groups, monkeypatch) -> None:
    monkeypatch.setattr(head, "PIECE_BYTES", 4 * 5 * 384)
    check_every_form(groups, WHOLE)


def test_so_it_is_on_ranks_that_hold_parts_of_it(tmp_path: Path) -> None:
    run_ranks(check_on_two_ranks, 2, logs=tmp_path)


def check_on_two_ranks() -> None:
    head.PIECE_BYTES = 4 * 5 * 192
    parallel = ParallelRecipe(tensor=2)
    with process_groups(parallel) as groups:
        check_every_form(groups, parallel)
