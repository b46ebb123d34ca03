"""A block decoded by weights laid out for few rows is what megatron's modules make of it."""

from __future__ import annotations

import pytest
import torch

from bd3_scale.model.build import build_model
from bd3_scale.recipe.schema import ModelRecipe
from bd3_scale.recipe.vocabulary import Vocabulary
from tests.model.test_transformer import positions_of, spans_of

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
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False).eval()


def last_block(model, clean):
    """Its logits by the cache and by the whole forward."""
    positions = positions_of(clean)
    cache = model.new_cache(2, clean.shape[1])
    model.prefill(clean[:, :8], positions[:, :8], spans_of(clean[:, :8], 4), cache)
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
