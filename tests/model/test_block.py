"""Check one layer: against a plain one, decoding against the whole forward, and replacements of its parts."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn

from bd3_scale.fused.heads import rotate
from bd3_scale.model.attend import AttendToRows
from bd3_scale.model.block import MLP, Attention, Block, Norm, Part, rotary_table
from bd3_scale.model.build import build_model, layer_shapes
from bd3_scale.model.init import initialise_weights
from bd3_scale.model.layout import parameter_layouts
from bd3_scale.model.linear import ColumnLinear
from bd3_scale.model.rows import RowContext
from bd3_scale.recipe.schema import ModelRecipe, ParallelRecipe
from bd3_scale.recipe.vocabulary import Vocabulary
from tests.integration import plain_model
from tests.model.test_recompute import inputs
from tests.model.test_transformer import positions_of, spans_of
from tests.support.caches import read

VOCABULARY = Vocabulary(size=60, eos_id=0, mask_id=57)
SHAPE = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 48, "init_std": 0.3}
FORMS = {
    "swiglu, rmsnorm, grouped heads": {"num_query_groups": 2},
    "gelu, layernorm": {"activation": "gelu", "normalization": "layernorm", "qk_norm": False},
    "gelu_tanh, biases": {"activation": "gelu_tanh", "mlp_bias": True, "attention_bias": True},
}


def build(groups, form, dtype):
    shape = ModelRecipe.model_validate(SHAPE | FORMS[form])
    (model,) = build_model(shape, VOCABULARY, groups, dtype=dtype, device=torch.device("cpu"), seed=5)
    generator = torch.Generator().manual_seed(6)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.requires_grad_(False).eval()


def last_block(model, clean):
    """Return the last block's logits by the cache and by the whole forward."""
    positions = positions_of(clean)
    cache = model.new_cache(2, clean.shape[1])
    read(model, clean[:, :8], 4, cache)
    found = model.decode(clean[:, 8:], positions[:, 8:], cache)
    expected = model.clean_logits(clean, positions, spans_of(clean, 4))[:, 8:]
    allowed = expected.isfinite()
    assert torch.equal(found.isfinite(), allowed)
    return found[allowed], expected[allowed]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.06), (torch.float64, 1e-5)])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_layer(groups, form, dtype, tolerance):
    model = build(groups, form, dtype)
    clean = torch.randint(0, 57, (2, 12), generator=torch.Generator().manual_seed(1))
    found, expected = last_block(model, clean)
    scale = expected.abs().max()
    assert scale > 0.5
    assert (found - expected).abs().max() < tolerance * scale


def test_a_new_cache_has_the_weights_of_now(groups):
    model = build(groups, "gelu, layernorm", torch.float32)
    clean = torch.randint(0, 57, (2, 12), generator=torch.Generator().manual_seed(1))
    before, _ = last_block(model, clean)
    for layer in model.decoder.layers:
        layer.mlp.linear_fc1.weight.mul_(-1)
        layer.self_attention.linear_qkv.weight.mul_(-1)
    after, expected = last_block(model, clean)
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(after, before, atol=0.1)


def rows_of(model):
    """Return a layer's input, noisy and clean rows, and their context."""
    micro = inputs()
    hidden, rows = model.embed(micro)
    return torch.randn(hidden.shape, generator=torch.Generator().manual_seed(4), dtype=hidden.dtype), rows


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_and_its_gradients_are_those_of_a_plain_one(groups, form):
    model = build(groups, form, torch.float32).requires_grad_()
    layer = model.decoder.layers[0]
    weights = {name: value.detach().clone().requires_grad_() for name, value in layer.named_parameters()}
    x_NBX, rows = rows_of(model)
    x_NBX.requires_grad_()
    found = sum(layer(x_NBX, None, rows))

    length = rows.rotary.shape[1] // 2
    mask = plain_model.dense_mask([0] * length, 8)[None]
    positions = torch.arange(length).repeat(2)[None]
    plain_x = x_NBX.detach().clone().requires_grad_()
    recipe, x = model.recipe, plain_x.transpose(0, 1)
    normed = plain_model.norm(x, weights, "input_layernorm.", recipe)
    x = x + plain_model.attention(normed, weights, positions, mask, recipe)
    x = x + plain_model.mlp(plain_model.norm(x, weights, "pre_mlp_layernorm.", recipe), weights, recipe)
    expected = x.transpose(0, 1)

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(5))
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    pairs = {name: (value.grad, weights[name].grad) for name, value in layer.named_parameters()}
    for name, (got, want) in {**pairs, "input": (x_NBX.grad, plain_x.grad)}.items():
        assert (got - want).norm() < 1e-5 * want.norm(), name


def test_rotation_turns_pairs_by_their_angle_and_back(groups):
    """Compare with complex numbers in float64, and the gradient with the inverse rotation."""
    recipe = ModelRecipe.model_validate(SHAPE)
    positions = torch.tensor([[0, 5, 3], [1000, 7, 1]])
    table = rotary_table(positions, recipe, torch.float64)
    x = torch.randn(2, 3, 2, 4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    angle = positions[..., None].double() / recipe.rope_theta ** (torch.arange(4).double() / 4)
    turn = torch.polar(torch.ones_like(angle), angle)[:, :, None, None]
    turned = torch.complex(x[..., :4].contiguous(), x[..., 4:].contiguous()) * turn
    expected = torch.cat([turned.real, turned.imag], -1)
    found = rotate(x, *table[..., None, None, :])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # the angles are computed in float32
    direction = torch.randn_like(found)
    got, want = (torch.autograd.grad((out * direction).sum(), x, retain_graph=True)[0] for out in (found, expected))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def with_layers(model, group, **choices):
    """Give a model layers that are made with `choices`, with the same weights where these exist."""
    layers, generator = [], torch.Generator().manual_seed(7)
    for old in model.decoder.layers:
        new = Block(model.recipe, model.config, group, layer=old.layer, **{k: v() for k, v in choices.items()})
        missing, _ = new.load_state_dict(old.state_dict(), strict=False)
        for name in missing:
            parameter = new.state_dict().get(name)
            if parameter is not None:
                nn.init.normal_(parameter, std=0.3, generator=generator)
        layers.append(new)
    model.decoder.layers = nn.ModuleList(layers)
    return model


@pytest.mark.parametrize("form", FORMS)
def test_decoding_follows_a_change_of_any_part(groups, form, monkeypatch):
    """Check that a layer is computed in one place only: decoding changes with each part."""
    model = build(groups, form, torch.float32)
    clean = torch.randint(0, 57, (2, 12), generator=torch.Generator().manual_seed(1))
    before, _ = last_block(model, clean)
    for part in (Norm, Attention, MLP, Block):
        monkeypatch.setattr(part, "forward", functools.partialmethod(doubled, part.forward))
        found, expected = last_block(model, clean)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        assert not torch.allclose(found, before, atol=0.1), part
        before = found


def doubled(self, forward, *args):
    found = forward(self, *args)
    # A norm and a layer also return a residual stream.
    return (found[0], 2 * found[1]) if isinstance(found, tuple) else 2 * found


class TwoExperts(Part):
    """A mixture in which a feature of each row chooses its expert; it has all that a layer needs of a mixture."""

    def __init__(self, model, config, group):
        super().__init__(config, group)
        self.first = MLP(model, config, group)
        self.second = MLP(model, config, group)

    def forward(self, x, pieces):
        return torch.where(x[..., :1] > 0, self.first(x, pieces), self.second(x, pieces))


@pytest.mark.parametrize("form", FORMS)
def test_another_module_may_stand_in_for_the_mlp(groups, form):
    model = build(groups, form, torch.float32)
    with_layers(model, groups.tp, mlp=lambda: TwoExperts(model.recipe, model.config, groups.tp))
    clean = torch.randint(0, 57, (2, 12), generator=torch.Generator().manual_seed(1))
    found, expected = last_block(model.requires_grad_(False), clean)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    keys = {piece.key for layout in parameter_layouts([model.requires_grad_()]) for piece in layout.pieces}
    assert {f"decoder.layers.mlp.{expert}.linear_fc1.weight" for expert in ("first", "second")} < keys
    model(inputs())[0].backward()
    assert not [name for name, parameter in model.decoder.named_parameters() if parameter.grad.norm() == 0]


class SquaredMLP(MLP):
    """A subclass of the package's MLP with another forward."""

    def forward(self, x, pieces):
        return self.linear_fc2(self.linear_fc1(x, pieces).relu().square(), pieces)


@pytest.mark.parametrize("form", ["gelu, layernorm", "gelu_tanh, biases"])
def test_an_mlp_with_a_forward_of_its_own_decodes_by_that(groups, form):
    model = build(groups, form, torch.float32)
    with_layers(model, groups.tp, mlp=lambda: SquaredMLP(model.recipe, model.config, groups.tp))
    clean = torch.randint(0, 57, (2, 12), generator=torch.Generator().manual_seed(1))
    found, expected = last_block(model.requires_grad_(False), clean)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class Scaled(ColumnLinear):
    """A linear layer that adds to the product, as an adapter does."""

    def forward(self, x, pieces=1, **how):
        return super().forward(x, pieces, **how) * 1.5


def test_a_linear_of_another_class_is_decoded_by_its_own_forward(groups):
    model = build(groups, "gelu_tanh, biases", torch.float32)
    clean = torch.randint(0, 57, (2, 12), generator=torch.Generator().manual_seed(1))
    before, _ = last_block(model, clean)
    for layer in model.decoder.layers:
        layer.self_attention.linear_qkv.__class__ = layer.mlp.linear_fc1.__class__ = Scaled
    found, expected = last_block(model, clean)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(found, before, atol=0.1)


class Ring:
    """Attention over keys that come in parts, as from ranks in a ring; the softmaxes are merged by their totals."""

    def __init__(self, mask, parts):
        self.mask, self.parts = mask, parts

    def __call__(self, layer, query, key, value):
        repeats = query.shape[2] // key.shape[2]
        key, value = (x.repeat_interleave(repeats, 2) for x in (key, value))
        scores = torch.einsum("ibhd,jbhd->bhij", query, key) / query.shape[-1] ** 0.5
        scores = scores.masked_fill(~self.mask, float("-inf"))
        total, out = torch.tensor(float("-inf")), 0.0
        for part in torch.arange(len(key)).chunk(self.parts):
            part_total = scores[..., part].logsumexp(-1, keepdim=True)
            merged = torch.logaddexp(total, part_total)
            share = (scores[..., part] - merged).exp().nan_to_num(0)  # no key seen yet
            out = out * (total - merged).exp().nan_to_num(0) + torch.einsum("bhij,jbhd->bhid", share, value[part])
            total = merged
        return out.permute(2, 0, 1, 3).flatten(2)


def test_keys_may_come_from_elsewhere(groups):
    model = build(groups, "swiglu, rmsnorm, grouped heads", torch.float32)
    x_NBX, rows = rows_of(model)
    mask = plain_model.dense_mask([0] * (rows.rotary.shape[1] // 2), 8)
    layer = model.decoder.layers[0]
    ring = RowContext(rows.rotary, Ring(mask, 5), rows.num_streams, rows.num_noisy)
    assert isinstance(rows.attend, AttendToRows)
    torch.testing.assert_close(layer(x_NBX, None, ring), layer(x_NBX, None, rows), rtol=1e-5, atol=1e-5)


def test_a_layers_tensors_are_known_without_memory(groups):
    for form in FORMS:
        model = build(groups, form, torch.float32)
        whole = {name: tuple(value.shape) for name, value in model.decoder.layers[1].named_parameters()}
        assert layer_shapes(model.recipe) == whole


def test_a_tensor_begins_as_it_says(groups):
    model = build(groups, "gelu_tanh, biases", torch.float32)
    scale = nn.Parameter(torch.empty(32))
    model.decoder.layers[0].mlp.scale = scale
    how = {"num_layers": 2, "init_std": 0.3, "seed": 5}
    with pytest.raises(
        ValueError,
        match=r"decoder\.layers\.mlp\.scale is no matrix and has no initial value: give the parameter an `initial`",
    ):
        initialise_weights(model.requires_grad_(), **how)
    scale.initial = 0.1
    initialise_weights(model, **how)
    assert (scale == 0.1).all()
    names = dict(model.named_parameters())
    assert all((value == 1).all() for name, value in names.items() if "norm.weight" in name)
    assert all((value == 0).all() for name, value in names.items() if name.endswith("bias"))
    assert names["decoder.layers.1.mlp.linear_fc1.weight"].std().item() == pytest.approx(0.3, rel=0.1)
    assert names["decoder.layers.1.mlp.linear_fc2.weight"].std().item() == pytest.approx(0.15, rel=0.1)


@pytest.mark.parametrize(("tensor", "sequence"), [(1, False), (2, False), (2, True)])
def test_gradients_that_are_a_part_of_a_sum_are_marked(groups, tensor, sequence):
    """Check norms of a rank's heads and, under sequence parallelism, of its rows; split weights are not marked."""
    of_rank = copy.copy(groups)
    of_rank.tp = dist.ProcessGroup(0, tensor)
    shape = ModelRecipe(**SHAPE, mlp_bias=True, attention_bias=True, normalization="layernorm", norm_bias=True)
    how = {"dtype": torch.float32, "device": torch.device("cpu"), "seed": None}
    recipe = ParallelRecipe(tensor=tensor, sequence=sequence)
    (model,) = build_model(shape, VOCABULARY, of_rank, parallel=recipe, **how)
    marked = {name for name, value in model.named_parameters() if getattr(value, "partial_over_tp", False)}
    of_heads = {f"decoder.layers.{i}.self_attention.{x}_layernorm.weight" for i in (0, 1) for x in "qk"}
    whole = {name for name, value in model.named_parameters() if not getattr(value, "tensor_model_parallel", False)}
    assert of_heads < whole
    assert len(whole) == 2 + 2 * (2 + 2 + 2 + 1)  # norms, those of heads, and the bias after the last product
    assert marked == (whole if sequence else of_heads if tensor == 2 else set())
