"""Check activation recomputation: less is kept for backward, and the gradients stay what they were."""

from __future__ import annotations

import pytest
import torch

from bd3_scale.attention.spans import make_spans
from bd3_scale.model.build import build_model
from bd3_scale.model.rows import ModelInputs
from bd3_scale.recipe.schema import ModelRecipe
from bd3_scale.recipe.vocabulary import Vocabulary

LENGTH, BATCH = 64, 2
VOCABULARY = Vocabulary(size=60, eos_id=0, mask_id=57)


def inputs() -> ModelInputs:
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(0, 57, (BATCH, LENGTH), generator=generator)
    spans = make_spans(torch.zeros(BATCH, LENGTH, dtype=torch.int32), 8)
    rows = torch.arange(0, LENGTH * BATCH, 3)
    return ModelInputs(
        tokens=torch.cat([torch.full_like(clean, 57), clean], 1),
        positions=torch.arange(LENGTH).expand(BATCH, -1),
        spans=spans,
        num_noisy=1,
        head_rows=rows,
        targets=clean[rows % BATCH, rows // BATCH],
        weights=torch.ones(len(rows)),
        noisy_pairs=0,
        clean_pairs=0,
    )


def step(groups, *recompute: str | int | None) -> tuple[int, dict[str, torch.Tensor]]:
    """Return the bytes kept for backward besides the weights, each storage once, and the gradients."""
    shape = ModelRecipe(num_layers=4, hidden_size=64, num_attention_heads=4, ffn_hidden_size=128)
    how = {"dtype": torch.float32, "device": torch.device("cpu"), "recompute": recompute}
    (model,) = build_model(shape, VOCABULARY, groups, seed=1, **how)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = model(inputs())
    size = sum(storage.nbytes() for storage in kept.values())
    loss.backward()
    return size, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def whole(groups):
    return step(groups, "none", None)


@pytest.mark.parametrize(
    ("recompute", "share"), [(("selective", None), 0.87), (("full", 2), 0.6), (("full", None), 0.15)]
)
def test_less_is_kept_and_gradients_are_equal(groups, whole, recompute, share):
    size, gradients = step(groups, *recompute)
    assert size < share * whole[0], size / whole[0]
    assert all(torch.equal(gradients[name], whole[1][name]) for name in gradients)


def test_a_whole_layer_keeps_its_input_alone(groups, whole):
    """Check that full recomputation keeps only [rows, hidden] of a layer; with two layers it keeps about half."""
    half, full = (step(groups, "full", layers)[0] for layers in (2, 4))
    layer_input = 2 * LENGTH * BATCH * 64 * 4
    assert whole[0] - half > 2 * 5 * layer_input
    assert half - full > 2 * 4 * layer_input  # the last layer has fewer rows
