"""Check quantised mixtures: every expert is quantised separately, by the rows that calibration sent to it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import bd3_scale
from bd3_scale.checkpoint.model import open_model
from bd3_scale.convert.calibration import Calibration
from bd3_scale.convert.check_export import round_weights
from bd3_scale.convert.compressed import unpacked_weight
from bd3_scale.convert.export import plan_export, run_export
from bd3_scale.convert.quantize import (
    QuantizationReport,
    check_quantizable,
    is_quantized,
    kernel_notes,
    run_quantize,
)
from bd3_scale.convert.quantizer import LEAST_ROWS, Scheme, gptq, round_to_nearest
from bd3_scale.convert.tables import show_quantization
from bd3_scale.recipe.schema import DataRecipe
from tests.convert.models import BYTES, LLADA2_SHAPE, SDAR_MOE_SHAPE, config, native_checkpoint, tensors

INT4 = Scheme(bits=4, group_size=8)
SHAPES = {"sdar_moe": SDAR_MOE_SHAPE, "llada2": LLADA2_SHAPE}
SEQUENCES = 4
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module", params=SHAPES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native_checkpoint(tmp_path_factory.mktemp("native") / "native", SHAPES[request.param], BYTES)


def test_every_projection_is_quantised_and_no_router(checkpoint: Path) -> None:
    plan = plan_export(checkpoint, dtype="bfloat16")
    check_quantizable(plan, INT4)
    layers = {
        quantised: {t.name.split(".", 3)[3] for t in plan.tensors if t.layer == 1 and is_quantized(t) == quantised}
        for quantised in (True, False)
    }
    experts = {f"mlp.experts.{e}.{p}.weight" for e in range(plan.config["num_experts"]) for p in PROJECTIONS}
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight", "mlp.gate.weight"}
    if plan.kind == "sdar_moe":
        assert layers[True] == experts | {f"self_attn.{name}_proj.weight" for name in "qkvo"}
        assert layers[False] == norms | {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}
    else:
        shared = {f"mlp.shared_experts.{name}.weight" for name in PROJECTIONS}
        assert layers[True] == experts | shared | {"attention.query_key_value.weight", "attention.dense.weight"}
        norms |= {f"attention.{name}_layernorm.weight" for name in ("query", "key")}
        assert layers[False] == norms | {"mlp.gate.expert_bias"}
    with pytest.raises(ValueError, match=r"groups of 16: .*down_proj.weight has 24"):
        check_quantizable(plan, Scheme(4, 16))


def test_engines_kernels_are_told_of_experts_widths(checkpoint: Path) -> None:
    plan = plan_export(checkpoint, dtype="bfloat16")
    notes = kernel_notes(plan, Scheme(4, 8))
    assert "an expert's down: 24 input features on a rank: Marlin runs multiples of 128" in notes
    dense = [note for note in notes if note.startswith(("gate/up", "down"))]
    shared = [note for note in notes if note.startswith("the shared expert's gate/up")]
    assert bool(dense) == bool(shared) == (plan.kind == "llada2")


@dataclass
class Quantised:
    """A folder that GPTQ wrote, its source, and its report."""

    checkpoint: Path
    folder: Path
    data: DataRecipe
    report: QuantizationReport

    def weight(self, name: str) -> Tensor:
        return unpacked_weight(tensors(self.folder), name, INT4)


# On the slow side: each makes transformers load its folder.
@pytest.fixture(scope="module")
def quantised(checkpoint: Path, topics: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantised:
    folder, data = tmp_path_factory.mktemp("quantised") / "out", DataRecipe(path=str(topics), seq_len=64)
    plan = plan_export(checkpoint, dtype="bfloat16")
    counts = {"calibration_sequences": SEQUENCES, "evaluation_sequences": 4, "draws": 1}
    report = run_quantize(plan, folder, INT4, "gptq", data, **counts)
    return Quantised(checkpoint, folder, data, report)


@pytest.mark.slow
def test_engines_are_told_to_leave_the_router(quantised: Quantised) -> None:
    assert config(quantised.folder)["quantization_config"]["ignore"] == ["lm_head", "re:.*mlp.gate$"]
    run_export(plan_export(quantised.checkpoint, dtype="bfloat16"), quantised.folder.parent / "plain", check=False)
    plain, found = tensors(quantised.folder.parent / "plain"), tensors(quantised.folder)
    routers = [name for name in plain if ".mlp.gate." in name]
    assert routers
    assert all(torch.equal(found[name], plain[name]) for name in routers)
    assert not any(".mlp.gate.weight_packed" in name for name in found)


@pytest.mark.slow
def test_experts_are_quantised_by_the_rows_that_they_met(quantised: Quantised) -> None:
    """Check the first layer with experts, whose input comes from quantised dense layers, or from none."""
    plan = plan_export(quantised.checkpoint, dtype="bfloat16")
    layer = plan.manifest.model.dense_layers
    with open_model(quantised.checkpoint, torch.float32) as (model, manifest, _):
        round_weights(model, torch.bfloat16)
        calibration = Calibration(model, quantised.data, manifest.trained_objective(), SEQUENCES)
        for before in range(layer):
            calibration.hessians(before)
            module = model.decoder.layers[before]
            for name, linear in (("gate_proj", 0), ("up_proj", 1)):
                rows = module.mlp.linear_fc1.weight.chunk(2)[linear]
                rows.data.copy_(quantised.weight(f"model.layers.{before}.mlp.{name}"))
            module.mlp.linear_fc2.weight.data.copy_(quantised.weight(f"model.layers.{before}.mlp.down_proj"))
            _take_attention(quantised, plan, module, before)
            calibration.advance(before)
        sums, experts = calibration.hessians(layer), model.decoder.layers[layer].mlp.experts
        for expert, total in enumerate(sums["mlp.experts.linear_fc2"]):
            weight = experts.linear_fc2.weight[expert].detach().float()
            found = quantised.weight(f"model.layers.{layer}.mlp.experts.{expert}.down_proj")
            nearest = round_to_nearest(weight, INT4, torch.bfloat16).dequantize()
            calibrated = gptq(weight, total.hessian, INT4, torch.bfloat16).dequantize()
            enough = total.rows >= LEAST_ROWS * weight.shape[1]
            assert torch.equal(found, calibrated if enough else nearest), expert
            assert not torch.equal(calibrated, nearest)
            wide = sums["mlp.experts.linear_fc1"][expert]
            place = f"layers.{layer}.experts.{expert}"
            assert quantised.report.seldom.get(place) == (None if wide.is_enough and enough else total.rows)


def _take_attention(quantised: Quantised, plan: Any, module: torch.nn.Module, layer: int) -> None:
    """Put the written weights of a layer's attention into the native model's."""
    for tensor in plan.tensors:
        if tensor.layer == layer and is_quantized(tensor) and "attention" in tensor.name:
            weight = module.get_parameter(tensor.key.removeprefix("decoder.layers."))
            for offset, part in tensor.split(quantised.weight(tensor.name.removesuffix(".weight"))):
                weight.data[offset[1] : offset[1] + part.shape[1]] = part[0].float()


@pytest.mark.slow
def test_what_calibration_seldom_met_is_told(quantised: Quantised, capsys: pytest.CaptureFixture[str]) -> None:
    report = quantised.report
    assert report.seldom
    assert all(".experts." in place for place in report.seldom)
    assert json.loads((quantised.folder / "quantization_report.json").read_text())["seldom"] == report.seldom
    show_quantization(report, quantised.folder, {})
    said = " ".join(capsys.readouterr().out.split())
    assert f"rounded to nearest, without GPTQ: {next(iter(report.seldom))}" in said
    assert "mlp.experts.*.down_proj.weight" in said
    assert "mlp.experts.0." not in said


@pytest.mark.slow
def test_a_quantised_mixture_runs_here(quantised: Quantised) -> None:
    """Check that a quantised mixture gives the same results here as its dequantised weights."""
    written, stands_for = tensors(quantised.folder), {}
    for name, tensor in written.items():
        module, _, part = name.rpartition(".")
        if part == "weight_packed":
            stands_for[f"{module}.weight"] = unpacked_weight(written, module, INT4)
        elif part not in ("weight_scale", "weight_shape"):
            stands_for[name] = tensor
    folder = shutil.copytree(quantised.folder, quantised.folder.parent / "unpacked")
    save_file(stands_for, folder / "model.safetensors", metadata={"format": "pt"})
    described = config(folder)
    del described["quantization_config"]
    (folder / "config.json").write_text(json.dumps(described))
    ids = torch.randint(0, 250, (2, 8), generator=torch.Generator().manual_seed(0))
    models = [bd3_scale.load(path, dtype=torch.float32) for path in (quantised.folder, folder)]
    assert torch.equal(*(model.logits(ids) for model in models))
    how = {"max_new_tokens": 12, "min_entropy": 0.0, "temperature": 0.0}
    packed, plain = (model.generate("ab", **how).text for model in models)
    assert packed == plain
