"""Check GGUF files: what llama.cpp computes with them, which types and tokenisers they have, and what is refused."""

from __future__ import annotations

import json
import pydoc_data.topics
import tomllib
from contextlib import closing
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bd3_scale.checkpoint.folder import resolve_checkpoint
from bd3_scale.checkpoint.model import open_model
from bd3_scale.checkpoint.tensors import TensorReader
from bd3_scale.cli import app
from bd3_scale.convert.calibration import Calibration
from bd3_scale.convert.export import ExportPlan
from bd3_scale.convert.gguf import GgufPlan, linear_of, plan_gguf, write_gguf
from bd3_scale.convert.gguf_export import GgufOptions, importance_matrix, run_gguf_export
from bd3_scale.convert.gguf_layout import choose_architecture
from bd3_scale.convert.gguf_report import divergences
from bd3_scale.convert.gguf_types import FILE_TYPES, TYPES, FileType, encoded, tensor_type
from bd3_scale.convert.names import NamedTensor
from bd3_scale.data.prepare import prepare
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.generate import llama_cpp
from bd3_scale.generate.llama_file import open_llama_file
from bd3_scale.recipe.schema import DataRecipe, ModelRecipe
from tests.convert.models import BYTES, LLAMA_SHAPE, OFFICIAL_SHAPE, QWEN_SHAPE, TIED, native_checkpoint
from tests.support import forks

PLAIN = {"qk_norm": False}
SHAPES = {
    "qwen3": QWEN_SHAPE,
    "qwen3, tied": TIED,
    "qwen2": QWEN_SHAPE.model_copy(update=PLAIN | {"attention_bias": True, "head_bias": True}),
    "llama": LLAMA_SHAPE,
    "llama, biases": QWEN_SHAPE.model_copy(update=PLAIN | {"mlp_bias": True}),
    "starcoder2": OFFICIAL_SHAPE,
    "starcoder2, a bias of the head alone": OFFICIAL_SHAPE.model_copy(
        update={"norm_bias": False, "tie_embeddings": True}
    ),
    "starcoder2, no bias of the head": OFFICIAL_SHAPE.model_copy(update={"head_bias": False}),
    "starcoder2, no biases": OFFICIAL_SHAPE.model_copy(
        update={"head_bias": False, "norm_bias": False, "mlp_bias": False, "attention_bias": False}
    ),
}
NOTHING = GgufOptions(None, 0, 0, 1)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    return {
        name: native_checkpoint(folder / str(number) / "native", shape, BYTES)
        for number, (name, shape) in enumerate(SHAPES.items())
    }


@pytest.mark.parametrize("name", SHAPES)
def test_llama_cpp_computes_the_model(name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    plan = plan_gguf(checkpoints[name], "f32", importance=False)
    assert plan.architecture == name.split(",")[0]
    report = run_gguf_export(plan, tmp_path / "out", NOTHING)
    assert (report.checked_texts, report.bytes_before) == (3000, plan.num_bytes)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {plan.name, "README.md", "gguf_report.json"}
    with (
        open_model(checkpoints[name]) as (native, _, _),
        open_llama_file(tmp_path / "out" / plan.name) as file,
        closing(file.load()) as model,
    ):
        ids = torch.randint(0, 256, (1, 8), generator=torch.Generator().manual_seed(1))
        caches = native.new_cache(1, 8), model.new_cache(1, 8)
        for start in (0, 4):
            block, positions = ids[:, start : start + 4], torch.arange(start, start + 4)[None]
            mine, theirs = (
                m.decode(block, positions, cache).reshape(4, -1)[:, :258]
                for m, cache in zip((native, model), caches, strict=True)
            )
            # llama.cpp computes GELU by a table in half precision.
            tolerance = 5e-3 if plan.architecture == "starcoder2" else 2e-5
            assert torch.equal(mine.isfinite(), theirs.isfinite())
            torch.testing.assert_close(theirs, mine, rtol=0, atol=tolerance)
            for m, cache in zip((native, model), caches, strict=True):
                m.prefill(block, positions, cache)


def test_a_file_says_what_it_is(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "m.bd3.gguf"
    write_gguf(plan_gguf(checkpoints["qwen3"], "bf16", importance=False), path)
    reader = gguf.GGUFReader(path)
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert said["general.architecture"] == "qwen3"
    assert said["qwen3.attention.causal"] is False
    assert said["diffusion.shift_logits"] is False
    assert said["diffusion.block_length"] == 4
    assert said["tokenizer.ggml.mask_token_id"] == 257
    assert said["tokenizer.ggml.eos_token_id"] == said["tokenizer.ggml.padding_token_id"] == 256
    assert said["tokenizer.ggml.add_bos_token"] is False
    assert "tokenizer.ggml.bos_token_id" not in said
    assert "tokenizer.chat_template" not in said
    assert said["general.file_type"] == 32
    assert json.loads(said["bd3_scale.manifest"])["name"] == "native"
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert {types[name] for name in types if "norm" in name} == {"F32"}
    assert types["output.weight"] == types["blk.1.ffn_down.weight"] == "BF16"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rope_scaling": LLAMA_SHAPE.rope_scaling}, "qwen3: its rotary frequencies are scaled as Llama 3's"),
        ({"activation": "gelu"}, "starcoder2: it has q/k norm"),
        (PLAIN | {"head_bias": True}, "qwen2: its query/key/value projection has no bias"),
        (PLAIN | {"attention_bias": True, "head_dim": 8}, "qwen2: its heads of 8 channels do not make up"),
    ],
)
def test_what_no_graph_computes_is_refused(changes: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=r"llama\.cpp has no architecture that computes this model") as raised:
        choose_architecture(QWEN_SHAPE.model_copy(update=changes))
    assert reason in str(raised.value)
    assert "--format bd3" in str(raised.value)


def test_other_activations_than_the_table_s_are_refused() -> None:
    with pytest.raises(ValueError, match="starcoder2: its activation is not gelu_tanh"):
        choose_architecture(OFFICIAL_SHAPE.model_copy(update={"activation": "gelu"}))


def test_a_bias_of_the_head_needs_a_last_norm_that_can_take_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_gguf(native_checkpoint(tmp_path / "native", OFFICIAL_SHAPE, BYTES), "f32", importance=False)
    read = ExportPlan.read

    def with_dead_channel(self: ExportPlan, reader: TensorReader, tensor: NamedTensor) -> torch.Tensor:
        values = read(self, reader, tensor)
        if tensor.name == "model.norm.weight":
            values[5] = 1e-6
        return values

    monkeypatch.setattr(ExportPlan, "read", with_dead_channel)
    with pytest.raises(ValueError, match="it cannot be moved into the last norm, which has weights of 1e-06"):
        write_gguf(plan, tmp_path / "m.gguf")


def test_next_token_models_are_left_to_llama_cpp_s_own_converter(tmp_path: Path) -> None:
    checkpoint = native_checkpoint(tmp_path / "native", QWEN_SHAPE, BYTES, block_size=1, objective="next_token")
    with pytest.raises(ValueError, match="cannot become Bd3ForCausalLM"):
        plan_gguf(checkpoint, "f32", importance=False)


# --- types


# The types that `llama_model_quantize` of the pinned release gave the tensors of a file of this shape, one by layer or
# one for all. Its bytes equalled those of our files, with and without an importance matrix.
WIDE = ModelRecipe(
    num_layers=16, hidden_size=256, num_attention_heads=8, num_query_groups=4, head_dim=32, ffn_hidden_size=512
)


def sensitive(other: str) -> list[str]:
    return ["Q6_K" if layer in (0, 1, 4, 7, 10, 13, 14, 15) else other for layer in range(16)]


MIXTURES = {
    "q8_0": {},
    "q6_k": {},
    "q5_k_m": dict.fromkeys(("attn_v", "ffn_down"), sensitive("Q5_K")),
    "q4_k_m": dict.fromkeys(("attn_v", "ffn_down"), sensitive("Q4_K")),
    "q4_0": {},
    "q4_0 with importance": {"ffn_down": ["Q4_1"] * 2 + ["Q4_0"] * 14},
    "q3_k_m": {
        "attn_v": ["Q5_K"] * 2 + ["Q4_K"] * 14,
        "attn_output": ["Q4_K"] * 16,
        "ffn_down": ["Q5_K"] + ["Q4_K"] * 15,
    },
    "q2_k": {name: ["Q3_K"] * 16 for name in ("attn_v", "attn_output", "ffn_down")},
}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_mixture_is_llama_cpp_s(mixture: str) -> None:
    kind, _, importance = mixture.partition(" with ")

    def chosen(name: str, columns: int = 256, layer: int | None = None, model: ModelRecipe = WIDE) -> str:
        return tensor_type(name, (64, columns), layer, kind, model, importance=bool(importance))

    default = FILE_TYPES[kind][1]
    assert chosen("token_embd.weight") == default
    assert chosen("output.weight") == ("Q8_0" if kind == "q8_0" else "Q6_K")
    for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        found = [chosen(f"blk.{layer}.{part}.weight", 256, layer) for layer in range(16)]
        assert found == MIXTURES[mixture].get(part, [default] * 16), part
    assert tensor_type("blk.0.attn_norm.weight", (256,), 0, kind, WIDE, importance=False) == "F32"
    smaller = {"q8_0": "Q8_0", "q6_k": "Q8_0", "q5_k_m": "Q5_1", "q4_k_m": "Q5_0"}.get(kind, "Q4_0")
    assert chosen("blk.3.ffn_up.weight", 288, 3) == smaller
    assert chosen("blk.3.ffn_up.weight", 100, 3) == "F16"
    shared = WIDE.model_copy(update={"num_query_groups": 2})
    assert chosen("blk.3.attn_v.weight", 256, 3, shared) == (
        "Q4_K" if kind == "q2_k" else chosen("blk.3.attn_v.weight", 256, 3)
    )


@pytest.mark.parametrize("kind", FILE_TYPES)
def test_values_come_back_from_every_type(kind: str) -> None:
    """Check that values read by `gguf`, which did not quantise them, are closer the more bits a type has."""
    errors = {"F32": 0.0, "F16": 1e-3, "BF16": 8e-3, "Q8_0": 1e-2, "Q6_K": 4e-2, "Q5_K": 8e-2, "Q4_K": 0.16,
              "Q4_0": 0.2, "Q3_K": 0.35, "Q2_K": 0.9}  # fmt: skip
    values = torch.randn(6, 512, generator=torch.Generator().manual_seed(0))
    name = FILE_TYPES[kind][1]
    form = gguf.GGMLQuantizationType(TYPES[name].number)
    assert (form.name, gguf.GGML_QUANT_SIZES[form]) == (name, (TYPES[name].block, TYPES[name].bytes))
    data = encoded(values, name, None)
    assert data.nbytes == TYPES[name].size((6, 512))
    found = gguf.quants.dequantize(data.view(np.float16) if name == "F16" else data.view(np.uint8)
                                   if name == "BF16" else data, form)  # fmt: skip
    error = np.abs(found.reshape(6, 512) - values.numpy()).max() / values.abs().max().item()
    assert error <= errors[name]
    assert error > 0 or name == "F32"


def test_an_importance_matrix_saves_what_matters() -> None:
    values = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    importance = torch.ones(256)
    importance[::16] = 1000.0
    form = gguf.GGMLQuantizationType.Q2_K

    def error(weights: torch.Tensor | None) -> float:
        found = torch.from_numpy(gguf.quants.dequantize(encoded(values, "Q2_K", weights), form))
        return float(((found - values).square() * importance).sum())

    assert error(importance) < 0.5 * error(None)


def test_what_a_type_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        encoded(torch.tensor([[float("nan")]]), "F32", None)
    with pytest.raises(ValueError, match=r"70000 exceeds the range of F16: use --type bf16"):
        encoded(torch.tensor([[70000.0]]), "F16", None)


# --- the whole


def test_a_file_that_computes_something_else_is_not_kept(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_gguf(checkpoints["llama, biases"], "f32", importance=False)
    # Query and key are permuted as for the other graphs: halves instead of neighbours.
    wrong = GgufPlan(plan.export, plan.kind, "llama", tuple(
        type(t)(t.name, t.shape, t.layer, t.source, lambda reader, t=t: plan.export.read(reader, t.source))
        for t in plan.tensors), plan.types, plan.tokenizer, plan.tokenizer_keys)  # fmt: skip
    with pytest.raises(ValueError, match=r"llama\.cpp's logits differ by .* more than f32 explains"):
        run_gguf_export(wrong, tmp_path / "out", NOTHING)
    assert list(tmp_path.iterdir()) == []


def test_the_report_measures_the_file(topics: Path, tmp_path: Path) -> None:
    data = DataRecipe(path=str(topics), seq_len=64)
    wide = WIDE.model_copy(update={"num_layers": 2, "init_std": 0.1})
    checkpoint = native_checkpoint(tmp_path / "native", wide, BYTES)
    told = []
    reports = {}
    for kind in ("f32", "q4_k_m"):
        plan = plan_gguf(checkpoint, kind, importance=True)
        options = GgufOptions(data, 4, sequences=4, draws=2)
        reports[kind] = run_gguf_export(plan, tmp_path / kind, options, lambda done, total: told.append((done, total)))
    exact, coarse = reports["f32"], reports["q4_k_m"]
    assert told[-1][0] == told[-1][1]
    assert json.loads((tmp_path / "q4_k_m" / "gguf_report.json").read_text())["rates"][0]["mask_rate"] == 0.1
    assert (exact.calibration_sequences, coarse.calibration_sequences) == (0, 4)
    assert coarse.bytes_after < 0.2 * exact.bytes_after
    write_gguf(plan, tmp_path / "plain.gguf")
    plain, calibrated = (
        {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(path).tensors}
        for path in (tmp_path / "plain.gguf", tmp_path / "q4_k_m" / plan.name)
    )
    changed = {name for name in plain if plain[name] != calibrated[name]}
    assert changed == {name for name in plain if "blk" in name and "norm" not in name}
    assert exact.before == coarse.before
    assert exact.after.nelbo == pytest.approx(exact.before.nelbo, abs=1e-6)
    assert abs(coarse.change.nelbo - (coarse.after.nelbo - coarse.before.nelbo)) < 1e-9
    assert [at.mask_rate for at in coarse.rates] == [0.1, 0.3, 0.5, 0.7, 0.9, 1.0]
    for fine, rough in zip(exact.rates, coarse.rates, strict=True):
        assert fine.tokens == rough.tokens
        assert fine.divergence < 1e-9 < 1e-4 < rough.divergence
        assert fine.same_token == 1.0 >= rough.same_token
    assert exact.rates[0].tokens < 0.2 * exact.rates[-1].tokens


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_line_writes_a_file_that_generates(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    checkpoint, out, data = checkpoints["qwen3"], tmp_path / "out", tmp_path / "data"
    (tmp_path / "text").mkdir()
    for number, text in enumerate(list(pydoc_data.topics.topics.values())[:12]):
        (tmp_path / "text" / f"{number}.txt").write_text(text[:2000])
    prepare([tmp_path / "text"], data, load_tokenizer("bytes"), 128, holdout=0.2, workers=1, progress=False)
    how = ("--format", "gguf", "--type", "f32", "--out", out)
    planned = run("convert", "export", checkpoint, *how, "--sequences", 0, "--dry-run", "--json")
    assert json.loads(planned.output)["architecture"] == "qwen3"
    assert not out.exists()
    found = run("convert", "export", checkpoint, *how, "--data", data, "--sequences", 2, "--draws", 1, "--json")
    assert found.exception is None, found.output
    report = json.loads(found.output)
    assert (report["evaluation_sequences"], report["calibration_sequences"]) == (2, 0)
    card = (out / "README.md").read_text()
    assert "generate rubbish" in card
    assert "bd3-scale generate native-f32.bd3.gguf" in card
    sampling = ("--prompt", "ab", "--max-new-tokens", 12, "--min-entropy", 0, "--json")
    mine, theirs = (run("generate", path, *sampling) for path in (checkpoint, out / "native-f32.bd3.gguf"))
    texts = [json.loads(told.output)["text"] for told in (mine, theirs)]
    assert texts[0] == texts[1]
    assert isinstance(run("convert", "export", checkpoint, *how).exception, ValueError | FileExistsError)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--type", "q8_0"], "--type and --data are for GGUF files"),
        (["--format", "gguf", "--dtype", "float16"], "give --type for a GGUF file"),
        (["--format", "gguf"], "unused"),
    ],
)
def test_options_that_do_not_belong_are_refused(
    options: list[str], words: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    told = run("convert", "export", checkpoints["qwen3"], "--out", tmp_path / "out", *options)
    assert words in str(told.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.launch
def test_an_importance_matrix_of_masked_rows_saves_what_layers_put_out(topics: Path, tmp_path: Path) -> None:
    """Check a trained model, whose inputs have columns of very different sizes: the outputs' error shrinks."""
    recipe = {
        "name": "wide",
        "model": {"num_layers": 3, "hidden_size": 256, "num_attention_heads": 4, "ffn_hidden_size": 512},
        "diffusion": {"block_size": 4},
        "data": {"path": str(topics), "seq_len": 64},
        "train": {"steps": 120, "global_batch_size": 16, "micro_batch_size": 16, "precision": "fp32"},
        "optimizer": {"lr": 1e-3},
        "run_dir": "run",
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    forks.bd3_scale("train", "recipe.yaml", cwd=tmp_path)
    checkpoint, data = resolve_checkpoint(tmp_path / "run"), DataRecipe(path=str(topics), seq_len=64)
    for kind in ("q2_k", "q3_k_m", "q4_k_m"):
        plain, calibrated = (output_error_of(checkpoint, data, kind, tmp_path, sequences) for sequences in (0, 128))
        assert calibrated < 0.97 * plain, kind


def output_error_of(checkpoint: Path, data: DataRecipe, kind: FileType, folder: Path, sequences: int) -> float:
    """Return the mean of ‖(W − Ŵ)X‖² / ‖WX‖² over the weights of all layers, on block diffusion inputs X."""
    plan, path = plan_gguf(checkpoint, kind, importance=sequences > 0), folder / f"{kind}-{sequences}.bd3.gguf"
    with open_model(checkpoint, torch.float32) as (native, manifest, _), TensorReader(checkpoint) as reader:
        objective = manifest.trained_objective()
        found = importance_matrix(native, Calibration(native, data, objective, sequences)) if sequences else None
        write_gguf(plan, path, found)
        written = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
        inputs, errors = Calibration(native, data, objective, 512), []
        for layer in range(manifest.model.num_layers):
            hessians = {name: total.hessian.double() for name, (total,) in inputs.hessians(layer).items()}
            for tensor in (t for t in plan.tensors if t.layer == layer and len(t.shape) == 2):
                weight = tensor.read(reader).double()
                change = torch.from_numpy(written[tensor.name].copy()).double() - weight
                inputs_of = hessians[linear_of(tensor.name)]
                errors.append(float(((change @ inputs_of) * change).sum() / ((weight @ inputs_of) * weight).sum()))
            inputs.advance(layer)
    return sum(errors) / len(errors)


def test_divergence_is_that_of_the_distributions() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25, 0.0]), torch.tensor([0.25, 0.25, 0.5, 0.0])
    expected = torch.nn.functional.kl_div(q[:3].log(), p[:3], reduction="sum").double()
    found = divergences(p.log()[None], q.log()[None] + 3.0)
    torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=0)


def test_the_release_is_the_one_that_the_project_pins() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert f"{llama_cpp.PACKAGE}=={llama_cpp.RELEASE}" in project["optional-dependencies"]["gguf"]
