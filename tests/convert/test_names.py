"""Check names of tensors: every value of the native tensors has exactly one place in the other format."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_scale.convert import names
from bd3_scale.convert.names import HEAD, NamedTensor, Style, named_tensors
from bd3_scale.model.build import layer_shapes
from bd3_scale.recipe.schema import ModelRecipe, MoeRecipe
from tests.convert.models import LLADA2_SHAPE, OFFICIAL_SHAPE, QWEN_SHAPE, SDAR_MOE_SHAPE, TIED


@st.composite
def models(draw: st.DrawFn) -> ModelRecipe:
    groups = draw(st.sampled_from([1, 2, 3]))
    return ModelRecipe(
        num_layers=draw(st.integers(1, 3)),
        hidden_size=12,
        num_attention_heads=groups * draw(st.sampled_from([1, 2])),
        num_query_groups=groups,
        head_dim=draw(st.sampled_from([2, 4])),
        ffn_hidden_size=10,
        activation=draw(st.sampled_from(["swiglu", "gelu"])),
        normalization="layernorm",
        norm_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        head_bias=draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
    )


@st.composite
def mixtures(draw: st.DrawFn) -> ModelRecipe:
    """Draw models with experts; heads have 8 channels, so that any whole number of pairs can be the rotated part."""
    layers, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2]))
    moe = MoeRecipe(
        num_experts=draw(st.integers(1, 3)),
        top_k=1,
        ffn_hidden_size=6,
        shared_ffn_hidden_size=draw(st.sampled_from([0, 6, 10])),
        first_dense_layers=draw(st.integers(0, layers - 1)),
        bias=draw(st.booleans()),
    )
    return ModelRecipe(
        num_layers=layers,
        hidden_size=12,
        num_attention_heads=groups * draw(st.sampled_from([1, 2])),
        num_query_groups=groups,
        head_dim=8,
        ffn_hidden_size=10,
        rotary_fraction=draw(st.sampled_from([0.25, 0.5, 0.75, 1.0])),
        moe=moe,
    )


@given(st.one_of(models(), mixtures()), st.sampled_from(["qwen3", "llada2"]))
@settings(deadline=None)
def test_boxes_tile_the_native_tensors(model: ModelRecipe, style: Style) -> None:
    named = named_tensors(model, vocab_rows=128, padded_rows=128, tied=model.tie_embeddings, style=style)
    check_tiles(list(named))


@given(mixtures())
@settings(deadline=None)
def test_turned_channels_of_llada2_come_first(model: ModelRecipe) -> None:
    """Check that LLaDA2 pairs channel i with i + r/2 of its first r channels, where native tensors pair i with i +
    D/2."""
    named = {t.name: t for t in named_tensors(model, vocab_rows=128, padded_rows=128, tied=False, style="llada2")}
    turned, heads = int(8 * model.rotary_fraction), model.num_attention_heads
    fused, norm = (named[f"model.layers.0.attention.{name}.weight"] for name in ("query_key_value", "query_layernorm"))
    # Rows of the native tensor in the order of the other format, and each one's channel in its head.
    rows = torch.tensor([o + i for (_, o, _), (_, n, _) in fused.boxes for i in range(n)])
    channels = rows[: heads * 8].view(heads, 8) % 8
    assert torch.equal(channels, channels[:1].expand(heads, 8))
    assert channels[0].tolist() == [o + i for (_, o), (_, n) in norm.boxes for i in range(n)]
    pairs = {frozenset(pair.tolist()) for pair in channels[0, :turned].view(2, -1).T}
    assert pairs == {frozenset((i, i + 4)) for i in range(turned // 2)}
    values = rows[-model.query_groups * 8 :]
    assert torch.equal(values, values.sort().values), "values stay"
    queries = (heads // model.query_groups) * 8
    blocks = rows[: heads * 8].view(heads, 8).min(1).values
    assert torch.equal(blocks // (queries + 16), torch.arange(model.query_groups).repeat_interleave(queries // 8))


def check_tiles(found: list[NamedTensor]) -> None:
    """Check that each element of a full native tensor comes out exactly once, however the model is split."""
    assert len({tensor.name for tensor in found}) == len(found)
    covered: dict[str, torch.Tensor] = {}
    for tensor in found:
        count = covered.setdefault(tensor.key, torch.zeros(tensor.full_shape, dtype=torch.int))
        values = torch.arange(tensor.numel).reshape(tensor.shape)
        boxes = list(tensor.split(values))
        for offset, data in boxes:
            place = tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))
            assert count[place].numel() == data.numel(), "a box lies inside its tensor"
            count[place] += 1
        assert torch.equal(tensor.join([data for _, data in boxes]), values)
    assert all((count == 1).all() for count in covered.values())


def test_a_tensor_that_a_layer_has_besides_goes_under_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"self_attention.sinks": (4,), "mlp.experts.weight": (3, 8, 48), "mlp.linear_fc1.scale": (128, 1)}
    known = layer_shapes(QWEN_SHAPE)
    before = [tensor.name for tensor in named_tensors(QWEN_SHAPE, vocab_rows=258, padded_rows=384, tied=False)]
    monkeypatch.setattr(names, "layer_shapes", lambda model: more | known)
    found = {tensor.name: tensor for tensor in named_tensors(QWEN_SHAPE, vocab_rows=258, padded_rows=384, tied=False)}
    assert [name for name in found if name in before] == before
    for key, shape in more.items():
        for layer in range(QWEN_SHAPE.num_layers):
            tensor = found.pop(f"model.layers.{layer}.{key.replace('self_attention', 'self_attn')}")
            assert (tensor.key, tensor.shape) == (f"decoder.layers.{key}", shape)
            assert tensor.boxes == (((layer, *(0,) * len(shape)), (1, *shape)),)
    assert list(found) == before


def test_two_tensors_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = layer_shapes(QWEN_SHAPE) | {"post_attention_layernorm.weight": (48,)}
    monkeypatch.setattr(names, "layer_shapes", lambda model: shapes)
    with pytest.raises(ValueError, match=r"rename the layer's post_attention_layernorm\.weight"):
        list(named_tensors(QWEN_SHAPE, vocab_rows=258, padded_rows=384, tied=False))


@pytest.mark.parametrize("model", [QWEN_SHAPE, OFFICIAL_SHAPE, TIED, SDAR_MOE_SHAPE, LLADA2_SHAPE])
def test_they_are_the_tensors_that_the_model_has(model: ModelRecipe) -> None:
    """Compare keys and shapes with those of a built megatron model."""
    from bd3_scale.model.build import build_model
    from bd3_scale.model.layout import parameter_layouts
    from bd3_scale.parallel.groups import process_groups
    from bd3_scale.recipe.schema import ParallelRecipe
    from bd3_scale.recipe.vocabulary import Vocabulary

    vocabulary = Vocabulary(size=258, eos_id=256, mask_id=257)
    with process_groups(ParallelRecipe()) as groups:
        how = {"dtype": torch.float32, "device": torch.device("cpu")}
        built = build_model(model, vocabulary, groups, seed=None, **how)
        layouts = [piece for layout in parameter_layouts(built) for piece in layout.pieces]
    named = list(named_tensors(model, vocab_rows=384, padded_rows=384, tied=model.tie_embeddings))
    assert {piece.key: piece.full_shape for piece in layouts} == {tensor.key: tensor.full_shape for tensor in named}
    assert sum(piece.numel for piece in layouts) == sum(math.prod(tensor.shape) for tensor in named)
    assert (HEAD in {tensor.name for tensor in named}) != model.tie_embeddings
