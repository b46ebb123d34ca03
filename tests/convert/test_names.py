"""Names of tensors: every value of the native tensors has one, and exactly one, place on the other side."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_scale.convert import names
from bd3_scale.convert.names import HEAD, NamedTensor, named_tensors
from bd3_scale.model.build import layer_shapes
from bd3_scale.recipe.schema import ModelRecipe
from tests.convert.models import OFFICIAL_SHAPE, QWEN_SHAPE, TIED


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


@given(models())
@settings(deadline=None)
def test_boxes_tile_the_native_tensors(model: ModelRecipe) -> None:
    check_tiles(list(named_tensors(model, vocab_rows=128, padded_rows=128, tied=model.tie_embeddings)))


def check_tiles(found: list[NamedTensor]) -> None:
    """Each element of a full native tensor is numbered; all numbers come out once, whatever the model's parts."""
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
    with pytest.raises(ValueError, match=r"call the layer's post_attention_layernorm\.weight otherwise"):
        list(named_tensors(QWEN_SHAPE, vocab_rows=258, padded_rows=384, tied=False))


@pytest.mark.parametrize("model", [QWEN_SHAPE, OFFICIAL_SHAPE, TIED])
def test_they_are_the_tensors_that_the_model_has(model: ModelRecipe) -> None:
    """Keys and shapes are megatron's own, read from a built model."""
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
