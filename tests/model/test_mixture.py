"""Check a mixture of experts in one process: routing, dispatch and combination, the experts' products, and that
decoding computes what training does.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from bd3_scale.model import experts as experts_module
from bd3_scale.model.build import build_model, layer_shapes, layers_with
from bd3_scale.model.dispatch import Order
from bd3_scale.model.experts import grouped_product
from bd3_scale.model.layout import parameter_layouts
from bd3_scale.model.router import choose
from bd3_scale.recipe.schema import ModelRecipe, MoeRecipe
from tests.integration import plain_model
from tests.model.test_block import VOCABULARY, rows_of
from tests.model.test_recompute import inputs
from tests.model.test_transformer import positions_of, spans_of
from tests.support.caches import read

SHAPE = {"num_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 48, "init_std": 0.3}
FORMS: dict[str, dict] = {
    "softmax": {"moe": {"num_experts": 8, "top_k": 2, "ffn_hidden_size": 16}},
    "softmax, as they are": {"moe": {"num_experts": 4, "top_k": 3, "ffn_hidden_size": 16, "normalize_top_k": False}},
    "sigmoid": {
        "rotary_fraction": 0.5,
        "moe": {
            "num_experts": 12,
            "top_k": 3,
            "ffn_hidden_size": 16,
            "shared_ffn_hidden_size": 24,
            "first_dense_layers": 1,
            "score": "sigmoid",
            "groups": 4,
            "top_groups": 2,
            "scale": 2.5,
            "bias": True,
        },
    },
    "one expert": {"moe": {"num_experts": 1, "top_k": 1, "ffn_hidden_size": 16}},
}


def build(groups, form: str, dtype: torch.dtype = torch.float32):
    shape = ModelRecipe.model_validate(SHAPE | FORMS[form])
    (model,) = build_model(shape, VOCABULARY, groups, dtype=dtype, device=torch.device("cpu"), seed=5)
    for number, mixture in model.mixtures.items():
        if mixture.router.expert_bias is not None:
            nn.init.normal_(mixture.router.expert_bias, std=0.3, generator=torch.Generator().manual_seed(number))
    return model


def weights_of(layer) -> dict[str, torch.Tensor]:
    bias = {name: value for name, value in layer.named_buffers() if name.endswith("expert_bias")}
    return {name: value.detach().clone().requires_grad_() for name, value in layer.named_parameters()} | bias


@st.composite
def choices(draw: st.DrawFn) -> tuple[MoeRecipe, list[list[float]], list[float] | None]:
    """Draw a mixture, scores of a few rows, and biases."""
    groups, size = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    top_groups = draw(st.one_of(st.none(), st.integers(1, groups)))
    moe = MoeRecipe(
        num_experts=groups * size,
        top_k=draw(st.integers(1, (top_groups or groups) * size)),
        ffn_hidden_size=1,
        score=draw(st.sampled_from(["softmax", "sigmoid"])),
        groups=groups,
        top_groups=top_groups,
        bias=draw(st.booleans()),
    )
    of_row = st.lists(st.floats(0, 1, width=32), min_size=groups * size, max_size=groups * size)
    bias = draw(st.lists(st.floats(-3, 3, width=32), min_size=groups * size, max_size=groups * size))
    return moe, draw(st.lists(of_row, min_size=1, max_size=4)), bias if moe.bias else None


@given(choices())
@settings(max_examples=300)
def test_rows_go_to_the_experts_that_sorting_finds(drawn) -> None:
    """Check the choice inside the best groups, with biases; of nearly equal experts either may be chosen."""
    moe, rows, bias = drawn
    scores, biases = torch.tensor(rows), None if bias is None else torch.tensor(bias)
    by = (scores if biases is None else scores + biases).tolist()
    expected, gaps = zip(*(plain_model.choose(values, moe) for values in by), strict=True)
    assume(min(gaps) > 1e-5)
    found = choose(scores, biases, moe)
    assert found.shape == (len(rows), moe.top_k)
    assert [set(row) for row in found.tolist()] == [set(row) for row in expected]
    assert all(len(set(row)) == moe.top_k for row in found.tolist())


@pytest.mark.parametrize("form", FORMS)
def test_a_row_s_experts_and_their_weights_are_those_of_the_plain_router(groups, form) -> None:
    model = build(groups, form)
    moe, router = model.recipe.moe, model.mixtures[1].router
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    experts, weights, counts = router(x, 2)
    w = weights_of(model.decoder.layers[1])
    _, (logits, chosen, gap) = plain_model.mixture(x, w, moe)
    assert gap > 1e-6
    plain = plain_model.expert_weights(plain_model.scores_of(logits, moe), chosen, moe)
    nothing = torch.zeros(10, moe.num_experts)
    found = nothing.scatter(1, experts, weights)
    expected = nothing.scatter(1, chosen.flatten(0, 1), plain.flatten(0, 1))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert weights.dtype == torch.float32
    assert torch.equal(counts, chosen.flatten().bincount(minlength=moe.num_experts))
    assert counts.sum() == 10 * moe.top_k


@given(st.data())
def test_the_way_to_the_experts_and_back_is_a_sum_of_copies(data: st.DataObject) -> None:
    """Check that copies are sorted by expert and keep their order, that each row gets the sum of its copies back, and
    that each direction's gradient is the other direction.
    """
    rows, each = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 4))
    keys = torch.tensor(
        data.draw(st.lists(st.integers(0, 5), min_size=rows * each, max_size=rows * each)), dtype=torch.int64
    )
    order = Order.by(keys, each=each)
    x = torch.randn(rows, 3, dtype=torch.float64).requires_grad_()
    y = torch.randn(rows * each, 3, dtype=torch.float64).requires_grad_()
    spread = order.spread(x)
    stands = sorted(range(rows * each), key=lambda copy: (int(keys[copy]), copy))
    assert torch.equal(spread, x[[copy // each for copy in stands]])
    collected = order.collect(y)
    back = [
        sum(y[place] for place, copy in enumerate(stands) if copy // each == row) + torch.zeros(3)
        for row in range(rows)
    ]
    torch.testing.assert_close(collected, torch.stack(back) if back else torch.zeros(0, 3).double())
    torch.testing.assert_close(order.collect(spread), x * each)
    if rows:
        of_x, of_y = torch.randn_like(spread), torch.randn_like(collected)
        (got_x,) = torch.autograd.grad(spread, x, of_x)
        (got_y,) = torch.autograd.grad(collected, y, of_y)
        assert torch.isclose((got_x * x).sum(), (of_x * spread).sum())
        assert torch.isclose((got_y * y).sum(), (of_y * collected).sum())


def test_bf16_copies_are_added_in_fp32() -> None:
    """Check 256 and ones: in bf16, added one after the other, each one would be rounded away."""
    order = Order.by(torch.zeros(5, dtype=torch.int64), each=5)
    copies = torch.tensor([[256.0], [1.0], [1.0], [1.0], [1.0]], dtype=torch.bfloat16)
    assert order.collect(copies).tolist() == [[260.0]]


COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=5)


@given(COUNTS, st.integers(0, 1000))
def test_a_grouped_product_is_a_product_for_each_expert(counts: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(counts), 8, generator=generator)
    weights = torch.randn(len(counts), 16, 8, generator=generator)
    found = grouped_product(x, weights, torch.tensor(counts))
    expected = [rows @ weight.t() for rows, weight in zip(x.split(counts), weights, strict=True)]
    torch.testing.assert_close(found, torch.cat(expected))


@pytest.mark.parametrize("in_one_call", [False, True])
@pytest.mark.parametrize("has_sums", [False, True])
@pytest.mark.parametrize("counts", [[7, 0, 16, 1], [0, 0, 24, 0], [0, 0, 0, 0]])
def test_experts_in_one_call_and_one_by_one_are_the_plain_ones(groups, monkeypatch, counts, has_sums, in_one_call):
    """Check gradients, too, in bf16, where a GPU takes the experts in one call: results are within rounding of the
    plain loop in float64, and gradients are added to existing sums in fp32.
    """
    monkeypatch.setattr(experts_module, "_in_one_call", lambda x: in_one_call)
    shape = ModelRecipe.model_validate(SHAPE | {"moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 16}})
    (model,) = build_model(shape, VOCABULARY, groups, dtype=torch.bfloat16, device=torch.device("cpu"), seed=5)
    experts = model.mixtures[0].experts
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(sum(counts), 32, generator=generator).bfloat16().requires_grad_()
    weights = torch.rand(sum(counts), generator=generator).requires_grad_()
    tensors = {"fc1": experts.linear_fc1.weight, "fc2": experts.linear_fc2.weight}
    plain = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    plain_x, plain_weights = x.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    before = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}
    if has_sums:
        for name, tensor in tensors.items():
            tensor.main_grad = before[name].clone()
    found = experts(x, weights, torch.tensor(counts))
    parts = zip(plain_x.split(counts), plain["fc1"], plain["fc2"], strict=True)
    expected = torch.cat([plain_model.gated(rows, *fc1, fc2) for rows, fc1, fc2 in parts]) * plain_weights[:, None]
    direction = torch.randn(found.shape, generator=generator).bfloat16()
    (found * direction).sum().backward()
    (expected * direction.double()).sum().backward()

    def close(got, want):
        assert got.shape == want.shape
        assert (got.double() - want).norm() <= 0.01 * want.norm()

    close(found, expected)
    close(x.grad, plain_x.grad)
    close(weights.grad, plain_weights.grad)
    for name, tensor in tensors.items():
        got = tensor.main_grad - before[name] if has_sums else tensor.grad
        assert (tensor.grad is None) == has_sums
        if has_sums:
            # What the sum held before determines how the added gradient is rounded.
            assert (got.double() - plain[name].grad).norm() <= 0.01 * plain[name].grad.norm() + 1e-5
        else:
            close(got, plain[name].grad)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("form", FORMS)
def test_a_layer_and_its_gradients_are_those_of_a_plain_one(groups, form, dtype, tolerance):
    """Check that few rows choose other experts in bf16, where scores are rounded, and that the others are near."""
    model = build(groups, form, dtype)
    layer, recipe = model.decoder.layers[1], model.recipe
    weights = {name: value.detach().float().requires_grad_() for name, value in weights_of(layer).items()}
    x_NBX, rows = rows_of(model)
    x_NBX.requires_grad_()
    found = sum(layer(x_NBX, None, rows)).float()

    length = rows.rotary.shape[1] // 2
    mask = plain_model.dense_mask([0] * length, 8)[None]
    positions = torch.arange(length).repeat(2)[None]
    plain_x = x_NBX.detach().float().requires_grad_()
    x = plain_x.transpose(0, 1)
    normed = plain_model.norm(x, weights, "input_layernorm.", recipe)
    x = x + plain_model.attention(normed, weights, positions, mask, recipe)
    added, _ = plain_model.mixture(plain_model.norm(x, weights, "pre_mlp_layernorm.", recipe), weights, recipe.moe)
    expected = (x + added).transpose(0, 1)
    near = (found - expected).norm(dim=-1) < tolerance * expected.norm(dim=-1)
    if dtype == torch.bfloat16:
        assert near.float().mean() > 0.9, near.float().mean()
        return
    assert near.all()
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(5))
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    pairs = {name: (value.grad, weights[name].grad) for name, value in layer.named_parameters()}
    for name, (got, want) in {**pairs, "input": (x_NBX.grad, plain_x.grad)}.items():
        assert (got - want).norm() <= tolerance * want.norm(), name


@pytest.mark.parametrize("form", FORMS)
def test_a_row_is_what_it_is_alone(groups, form):
    """Check that no expert has a capacity: a row's output does not depend on other rows."""
    mixture = build(groups, form).mixtures[1].requires_grad_(False)
    x = torch.randn(40, 1, 32, generator=torch.Generator().manual_seed(2))
    x[10:30] = x[10]  # as masked rows of a first layer are
    together = mixture(x)
    alone = torch.cat([mixture(row[None]) for row in x])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block_size", [1, 4, 8])
@pytest.mark.parametrize("form", FORMS)
def test_cached_blocks_give_the_two_stream_likelihoods(token_nll, groups, form, block_size):
    """Compare the nll of every masked token of every block, from one forward and block by block through the cache."""
    model = build(groups, form).requires_grad_(False).eval()
    clean = torch.randint(0, 57, (2, 24), generator=torch.Generator().manual_seed(0))
    positions = positions_of(clean)
    masked = torch.rand(clean.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    noisy = clean.masked_fill(masked, VOCABULARY.mask_id)
    rows = masked.flatten().nonzero()[:, 0]
    expected = torch.zeros(clean.shape)
    expected[masked] = token_nll(model, noisy, clean, positions, spans_of(clean, block_size), rows)
    one_by_one, at_once = model.new_cache(2, 24), model.new_cache(2, 24)
    read(model, clean[:, :16], block_size, at_once)
    for start in range(0, 24, block_size):
        block = slice(start, start + block_size)
        this = masked[:, block]
        logits = model.decode(noisy[:, block], positions[:, block], one_by_one)
        nll = -logits.log_softmax(-1).gather(-1, clean[:, block, None])[..., 0]
        torch.testing.assert_close(nll[this], expected[:, block][this], rtol=1e-5, atol=2e-5)
        # Some positions only, after a prompt that was read at once.
        some = model.decode(noisy[:, block], positions[:, block], one_by_one, this)
        torch.testing.assert_close(some, logits[this], rtol=1e-5, atol=2e-5)
        if start == 16:
            behind = model.decode(noisy[:, block], positions[:, block], at_once)
            torch.testing.assert_close(behind, logits, rtol=1e-5, atol=2e-5)
        model.prefill(clean[:, block], positions[:, block], one_by_one)


def test_biases_choose_in_decoding_too(groups):
    """Check also that an earlier cache keeps the earlier biases: it belongs to the model as it was."""
    model = build(groups, "sigmoid").requires_grad_(False).eval()
    clean = torch.randint(0, 57, (2, 8), generator=torch.Generator().manual_seed(0))

    def logits():
        return model.decode(clean, positions_of(clean), model.new_cache(2, 8))

    before = logits()
    for mixture in model.mixtures.values():
        mixture.router.expert_bias.copy_(mixture.router.expert_bias.flip(0))
    after, expected = logits(), model.clean_logits(clean, positions_of(clean), spans_of(clean, 8))
    finite = expected.isfinite()
    torch.testing.assert_close(after[finite], expected[finite], rtol=1e-5, atol=2e-5)
    assert not torch.allclose(before[finite], after[finite], atol=0.1)


def test_only_what_has_a_backward_is_counted(groups):
    """Check that evaluation and decoding leave a step's counts as they are, and that each step starts at zero."""
    model = build(groups, "sigmoid")
    loads = [mixture.router.load for mixture in model.mixtures.values()]
    total, _ = model(inputs())
    rows = [int(load.sum()) for load in loads]
    # Two sequences of 64 noisy and 64 clean rows, three experts each; in the last layer noisy ones alone.
    assert rows == [2 * 128 * 3, 2 * 64 * 3]
    total.backward()
    with torch.no_grad():
        model(inputs())
    assert [int(load.sum()) for load in loads] == rows
    model(inputs())
    assert [int(load.sum()) for load in loads] == [2 * count for count in rows]
    for mixture in model.mixtures.values():
        mixture.router.begin_step(0.0)
    assert not any(load.any() for load in loads)


@pytest.mark.parametrize("form", FORMS)
def test_tensors_of_dense_and_of_sparse_layers_are_numbered_among_themselves(groups, form):
    model = build(groups, form)
    moe, layers = model.recipe.moe, model.recipe.num_layers
    dense, experts, width, shared = (
        moe.first_dense_layers,
        moe.num_experts,
        moe.ffn_hidden_size,
        moe.shared_ffn_hidden_size,
    )
    expected = {
        "mlp.router.weight": (layers - dense, experts, 32),
        "mlp.experts.linear_fc1.weight": (layers - dense, experts, 2, width, 32),
        "mlp.experts.linear_fc2.weight": (layers - dense, experts, 32, width),
    }
    if moe.bias:
        expected["mlp.router.expert_bias"] = (layers - dense, experts)
    if shared:
        expected["mlp.shared_experts.linear_fc1.weight"] = (layers - dense, 2 * shared, 32)
        expected["mlp.shared_experts.linear_fc2.weight"] = (layers - dense, 32, shared)
    if dense:
        expected["mlp.linear_fc1.weight"] = (dense, 96, 32)
        expected["mlp.linear_fc2.weight"] = (dense, 32, 48)
    pieces = {piece.key: piece for layout in parameter_layouts([model]) for piece in layout.pieces}
    found = {key.removeprefix("decoder.layers."): piece.full_shape for key, piece in pieces.items() if ".mlp." in key}
    assert found == expected
    shapes = {name: shape for name, shape in layer_shapes(model.recipe).items() if name.startswith("mlp.")}
    assert {name: (len(layers_with(model.recipe, name)), *shape) for name, shape in shapes.items()} == expected
    # Every element of every layer has exactly one place.
    numels: dict[str, int] = {}
    for layout in parameter_layouts([model]):
        for piece in layout.pieces:
            numels[piece.key] = numels.get(piece.key, 0) + piece.numel
    assert all(numels[f"decoder.layers.{name}"] == math.prod(shape) for name, shape in expected.items())


def test_each_expert_of_each_layer_begins_with_weights_of_its_own(groups):
    model = build(groups, "sigmoid")
    matrices = [
        matrix
        for mixture in model.mixtures.values()
        for weight in (mixture.experts.linear_fc1.weight.flatten(0, 1), mixture.experts.linear_fc2.weight)
        for matrix in weight.detach()
    ]
    assert len({float(matrix.sum()) for matrix in matrices}) == len(matrices) == 2 * 12 * 3
    fc1, fc2 = (getattr(model.mixtures[1].experts, name).weight for name in ("linear_fc1", "linear_fc2"))
    assert fc1.std().item() == pytest.approx(0.3, rel=0.05)
    assert fc2.std().item() == pytest.approx(0.3 / math.sqrt(6), rel=0.05)
    assert model.mixtures[1].router.weight.std().item() == pytest.approx(0.3, rel=0.15)
