"""Check that calibration's sums equal those of whole forwards, under masks of every rate."""

from __future__ import annotations

import pydoc_data.topics

import pytest
import torch

from bd3_scale.convert.calibration import LINEARS, Calibration, calibration_batches, calibration_inputs
from bd3_scale.data.prepare import prepare
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.model.build import build_model
from bd3_scale.objective import BlockDiffusion, NextToken
from bd3_scale.recipe.schema import DataRecipe, DiffusionRecipe, ModelRecipe, MoeRecipe
from bd3_scale.recipe.vocabulary import Vocabulary

SEQUENCES = 16
DIFFUSION = DiffusionRecipe(block_size=8, mask_rate_low=0.4, mask_rate_high=0.6)
BYTES = Vocabulary(size=258, eos_id=256, mask_id=257)
OBJECTIVE = BlockDiffusion(DIFFUSION, BYTES)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataRecipe:
    folder = tmp_path_factory.mktemp("calibration")
    (folder / "text").mkdir()
    for i, text in enumerate(list(pydoc_data.topics.topics.values())[:24]):
        (folder / "text" / f"{i}.txt").write_text(text)
    prepare([folder / "text"], folder / "data", load_tokenizer("bytes"), 64, holdout=0.1, progress=False)
    return DataRecipe(path=str(folder / "data"), seq_len=64)


SHAPE = ModelRecipe(num_layers=2, hidden_size=16, num_attention_heads=2, ffn_hidden_size=24, init_std=0.2)
MIXTURE = MoeRecipe(num_experts=4, top_k=2, ffn_hidden_size=20, shared_ffn_hidden_size=12, first_dense_layers=1)


def built(shape: ModelRecipe, groups):
    (model,) = build_model(shape, BYTES, groups, dtype=torch.float32, device=CPU, seed=1)
    return model.eval()


@pytest.fixture
def model(groups):
    return built(SHAPE, groups)


def whole_forward(model, inputs) -> dict[tuple[int, str], torch.Tensor]:
    """Return Σ x xᵀ in float64 of the inputs of every linear layer, from complete forwards."""
    sums: dict[tuple[int, str], torch.Tensor] = {}
    hooks = []
    for layer, module in enumerate(model.decoder.layers):
        for name in linears(module):

            def add(_, args, key=(layer, name)) -> None:
                rows = args[0].flatten(0, -2).double()
                sums[key] = sums.get(key, 0) + rows.T @ rows

            hooks.append(module.get_submodule(name).register_forward_pre_hook(add))
    with torch.no_grad():
        for micro in inputs:
            model(micro)
    for hook in hooks:
        hook.remove()
    return sums


def linears(module) -> list[str]:
    return [name for name, _ in module.named_modules() if name in LINEARS]


def compare(calibration: Calibration, expected: dict[tuple[int, str], torch.Tensor], layer: int) -> None:
    found = calibration.hessians(layer)
    assert {(layer, name) for name in found if ".experts." not in name} == {key for key in expected if key[0] == layer}
    for _, name in (key for key in expected if key[0] == layer):
        (total,) = found[name]
        difference = (total.hessian - expected[layer, name]).norm() / expected[layer, name].norm()
        assert difference < 1e-5, name


def test_the_sums_are_those_of_whole_forwards(model, data: DataRecipe) -> None:
    inputs = [calibration_inputs(batch, OBJECTIVE, CPU) for batch in calibration_batches(data, SEQUENCES)]
    expected = whole_forward(model, inputs)
    calibration = Calibration(model, data, OBJECTIVE, SEQUENCES)
    for layer in range(2):
        compare(calibration, expected, layer)
        calibration.advance(layer)


def test_a_layer_sees_the_layers_before_it_as_they_have_become(model, data: DataRecipe) -> None:
    calibration = Calibration(model, data, OBJECTIVE, SEQUENCES)
    calibration.hessians(0)
    with torch.no_grad():
        model.decoder.layers[0].mlp.linear_fc2.weight.mul_(2)
    calibration.advance(0)
    inputs = [calibration_inputs(batch, OBJECTIVE, CPU) for batch in calibration_batches(data, SEQUENCES)]
    compare(calibration, whole_forward(model, inputs), 1)


@torch.no_grad()
def routed(model, inputs, layer: int) -> dict[str, list[tuple[int, torch.Tensor]]]:
    """Return the rows and Σ x xᵀ that each expert of a layer multiplies, in float64, from whole forwards."""
    mixture, met = model.decoder.layers[layer].mlp, []
    hook = mixture.router.register_forward_hook(lambda _, args, found: met.append((args[0].flatten(0, -2), found)))
    for micro in inputs:
        model(micro)
    hook.remove()
    found = {"mlp.experts.linear_fc1": [], "mlp.experts.linear_fc2": []}
    for expert in range(len(mixture.experts.linear_fc1.weight)):
        gate, up = mixture.experts.linear_fc1.weight[expert].double()
        sums = {name: [0, 0.0] for name in found}
        for rows, routing in met:
            row, place = torch.where(routing.experts == expert)
            x = rows[row].double()
            inner = torch.nn.functional.silu(x @ gate.T) * (x @ up.T) * routing.weights[row, place, None].double()
            for name, values in zip(found, (x, inner), strict=True):
                sums[name] = [sums[name][0] + len(values), sums[name][1] + values.T @ values]
        for name, (count, total) in sums.items():
            found[name].append((count, total))
    return found


def test_each_expert_has_the_rows_that_were_sent_to_it(groups, data: DataRecipe) -> None:
    model = built(SHAPE.model_copy(update={"moe": MIXTURE}), groups)
    inputs = [calibration_inputs(batch, OBJECTIVE, CPU) for batch in calibration_batches(data, SEQUENCES)]
    whole, expected = whole_forward(model, inputs), routed(model, inputs, 1)
    calibration = Calibration(model, data, OBJECTIVE, SEQUENCES)
    compare(calibration, whole, 0)
    calibration.advance(0)
    compare(calibration, whole, 1)
    hessians, squares = calibration.hessians(1), calibration.squares(1)
    for name, of_experts in expected.items():
        assert len(hessians[name]) == len(squares[name]) == 4
        counts = [count for count, _ in of_experts]
        assert [total.rows for total in hessians[name]] == [total.rows for total in squares[name]] == counts
        # Noisy rows of all sequences, two experts each: nothing reads what the last layer makes of clean ones.
        assert sum(counts) == 2 * 64 * SEQUENCES
        assert len(set(counts)) > 1
        for (_, total), hessian, square in zip(of_experts, hessians[name], squares[name], strict=True):
            torch.testing.assert_close(hessian.hessian.double(), total, rtol=1e-4, atol=1e-5 * float(total.trace()))
            torch.testing.assert_close(square.squares, hessian.hessian.diagonal(), rtol=1e-4, atol=1e-6)


def test_masks_of_all_rates_and_clean_rows_are_met(data: DataRecipe) -> None:
    """Check that every mask rate occurs, whatever interval the model was trained on, in noisy and clean rows."""
    batches = list(calibration_batches(data, SEQUENCES))
    assert sum(len(batch.ids) for batch in batches) == SEQUENCES
    shares = []
    for batch in batches:
        tokens = calibration_inputs(batch, OBJECTIVE, CPU).tokens
        noisy, clean = tokens.chunk(2, 1)
        assert torch.equal(clean, batch.tokens)
        shares += (noisy == BYTES.mask_id).unflatten(1, (-1, 8)).float().mean(2).flatten().tolist()
    assert sum(share < 0.25 for share in shares) > 0.1 * len(shares)
    assert sum(share > 0.75 for share in shares) > 0.1 * len(shares)


def test_a_next_token_model_is_calibrated_on_clean_rows(data: DataRecipe) -> None:
    batch = next(calibration_batches(data, 4))
    inputs = calibration_inputs(batch, NextToken(DiffusionRecipe(block_size=1), BYTES), CPU)
    assert torch.equal(inputs.tokens, batch.tokens)
