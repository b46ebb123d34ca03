"""Check mixtures of experts in GGUF files: what llama.cpp computes, their types, and importance by expert."""

from __future__ import annotations

import json
import pydoc_data.topics
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bd3_scale.checkpoint.model import open_model
from bd3_scale.checkpoint.tensors import TensorReader
from bd3_scale.cli import app
from bd3_scale.convert.calibration import Calibration
from bd3_scale.convert.gguf import linear_of, plan_gguf, undersampled_weights, write_gguf
from bd3_scale.convert.gguf_export import GgufOptions, importance_matrix, run_gguf_export
from bd3_scale.convert.gguf_layout import choose_architecture
from bd3_scale.convert.gguf_types import FILE_TYPES, encoded, tensor_type
from bd3_scale.convert.importer import plan_import, run_import
from bd3_scale.convert.quantizer import LEAST_ROWS_OF_SQUARES, SquareSum
from bd3_scale.convert.tables import show_gguf
from bd3_scale.data.prepare import prepare
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.generate.llama_file import open_llama_file
from bd3_scale.recipe.schema import DataRecipe, ModelRecipe, MoeRecipe
from tests.convert.models import BYTES, LLADA2_SHAPE, QWEN_SHAPE, SDAR_MOE_SHAPE, TIED, native_checkpoint
from tests.convert.test_reference import MASK, NEW, PROMPTS, REFERENCE, RULES, UNSAID, K
from tests.generate.sampling import generate_batch

NOTHING = GgufOptions(None, 0, 0, 1)
SQUARE = LLADA2_SHAPE.model_copy(update={"head_dim": None})
CLOSE = 1e-4


def mixture(shape: ModelRecipe, of: ModelRecipe, **changes: object) -> ModelRecipe:
    """Return a shape with the mixture of another, changed."""
    return shape.model_copy(update={"moe": of.moe.model_copy(update=changes)})


SHAPES = {
    "qwen3moe": SDAR_MOE_SHAPE,
    "qwen3moe, tied, all experts": mixture(TIED, SDAR_MOE_SHAPE, top_k=4),
    "bailingmoe2": SQUARE,
    "bailingmoe2, one expert of each row": mixture(
        QWEN_SHAPE, LLADA2_SHAPE, top_k=1, groups=1, top_groups=None, shared_ffn_hidden_size=24, first_dense_layers=0
    ),
    "bailingmoe2, all groups": mixture(SQUARE, LLADA2_SHAPE, top_groups=None, scale=1.0),
}


@contextmanager
def both(checkpoint: Path, file: Path) -> Iterator[tuple[Any, Any]]:
    """Return the native model in fp32, and its file opened by llama.cpp."""
    with (
        open_model(checkpoint, torch.float32) as (native, _, _),
        open_llama_file(file) as opened,
        closing(opened.load()) as model,
    ):
        yield native, model


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return logits of one text, fp32 [L, V], block after block, with the earlier blocks in the cache."""
    cache, found = model.new_cache(1, ids.shape[1]), []
    for start in range(0, ids.shape[1], K):
        block, positions = ids[:, start : start + K], torch.arange(start, start + K)[None]
        found.append(model.decode(block, positions, cache).flatten(0, -2))
        model.prefill(block, positions, cache)
    return torch.cat(found)


@pytest.mark.parametrize("name", SHAPES)
def test_llama_cpp_computes_the_mixture(name: str, tmp_path: Path) -> None:
    checkpoint = native_checkpoint(tmp_path / "native" / "native", SHAPES[name], BYTES)
    plan = plan_gguf(checkpoint, "f32", importance=False)
    assert plan.architecture == name.split(",")[0]
    run_gguf_export(plan, tmp_path / "out", NOTHING)
    ids = torch.randint(0, 256, (1, 32), generator=torch.Generator().manual_seed(1))
    ids[0, 29:] = BYTES.mask_id
    prompts = [[7], [1, 2, 3, 4, 5], [*range(41)]]
    greedy = {"block_size": K, "max_new_tokens": 14, "min_entropy": 0.0, "temperature": 0.0}
    with both(checkpoint, tmp_path / "out" / plan.name) as models:
        mine, theirs = (logits(model, ids)[:, :257] for model in models)
        torch.testing.assert_close(theirs, mine, rtol=0, atol=CLOSE)
        for rule in RULES.values():
            expected, found = (generate_batch(model, prompts, **greedy, **rule) for model in models)
            assert found == expected


@pytest.fixture(scope="module", params=list(UNSAID))
def official(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a checkpoint and a file of the official code's random model, with bytes and unused tokens as
    vocabulary."""
    if not (REFERENCE / request.param).is_dir():
        pytest.skip("BD3_SCALE_REFERENCE names no folder with values of official code")
    folder = tmp_path_factory.mktemp(request.param)
    source = shutil.copytree(REFERENCE / request.param, folder / "source")
    load_tokenizer("bytes").save(source)
    content = json.loads((source / "tokenizer.json").read_text())
    eos, mask = content["added_tokens"]
    content["added_tokens"] = [eos, *({**eos, "id": i, "content": f"<{i}>"} for i in (257, 258)), {**mask, "id": MASK}]
    (source / "tokenizer.json").write_text(json.dumps(content))
    run_import(plan_import(source, **UNSAID[request.param]), folder / "native")
    plan = plan_gguf(folder / "native", "f32", importance=False)
    write_gguf(plan, folder / plan.name)
    return folder / "native", folder / plan.name


def test_llama_cpp_computes_what_the_official_code_does(official: tuple[Path, Path]) -> None:
    folder = official[0].parent
    with np.load(folder / "source" / "golden.npz") as values, both(*official) as (_, model):
        for ids, expected, rows in (
            ("clean_ids", "clean_logits", slice(None)),
            ("masked_all_ids", "masked_all_cache_logits", slice(-K, None)),
            ("masked_part_ids", "masked_part_cache_logits", slice(-K, None)),
        ):
            found = logits(model, torch.from_numpy(values[ids]).long()[None])[rows, :MASK]
            torch.testing.assert_close(found, torch.from_numpy(values[expected])[:, :MASK], rtol=0, atol=CLOSE)
        for prompt in PROMPTS:
            begin = values[f"prompt_{prompt}"].tolist()
            for rule, options in RULES.items():
                how = {"block_size": K, "max_new_tokens": NEW, "min_entropy": 0.0, "temperature": 0.0, **options}
                (found,) = generate_batch(model, [begin], **how)
                assert found.tokens == values[f"ev{rule}_{prompt}.out"].tolist()[len(begin) :][:NEW], (prompt, rule)


def test_the_file_says_what_a_mixture_is(tmp_path: Path) -> None:
    plan = plan_gguf(native_checkpoint(tmp_path / "n" / "native", SQUARE, BYTES), "q8_0", importance=False)
    write_gguf(plan, tmp_path / plan.name)
    reader = gguf.GGUFReader(tmp_path / plan.name)
    said = {name.removeprefix("bailingmoe2."): field.contents() for name, field in reader.fields.items()}
    assert {name: said[name] for name in said if "expert" in name} == {
        "expert_count": 6, "expert_used_count": 2, "expert_feed_forward_length": 24, "expert_shared_count": 1,
        "expert_shared_feed_forward_length": 48, "expert_gating_func": 2, "expert_weights_norm": True,
        "expert_weights_scale": 2.5, "expert_group_count": 3, "expert_group_used_count": 2,
    }  # fmt: skip
    assert (said["leading_dense_block_count"], said["rope.dimension_count"], said["attention.causal"]) == (1, 6, False)
    shapes = {t.name: tuple(reversed(t.shape.tolist())) for t in reader.tensors if t.name.startswith("blk.2.")}
    assert shapes["blk.2.ffn_gate_exps.weight"] == shapes["blk.2.ffn_up_exps.weight"] == (6, 24, 48)
    assert shapes["blk.2.ffn_down_exps.weight"] == (6, 48, 24)
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    assert types["blk.2.ffn_gate_inp.weight"] == types["blk.2.exp_probs_b.bias"] == "F32"
    assert not any("exps" in name for name in types if name.startswith("blk.0."))


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (mixture(TIED, SDAR_MOE_SHAPE, normalize_top_k=False), "qwen3moe: it has moe.normalize_top_k=False"),
        (
            mixture(TIED, SDAR_MOE_SHAPE, first_dense_layers=1),
            "qwen3moe: it has moe.first_dense_layers=1, and qwen3moe",
        ),
        (mixture(TIED, SDAR_MOE_SHAPE, score="sigmoid"), "qwen3moe: it has moe.score='sigmoid'"),
        (mixture(TIED, SDAR_MOE_SHAPE, scale=2.0), "qwen3moe: it has moe.scale=2.0"),
        (mixture(TIED, SDAR_MOE_SHAPE, num_experts=1025), "qwen3moe: it has 1025 experts"),
        (SQUARE.model_copy(update={"qk_norm": False}), "bailingmoe2: it has no q/k norm"),
        (LLADA2_SHAPE, "bailingmoe2: its heads of 16 channels do not make up the hidden size 48"),
        (mixture(SQUARE, SQUARE, bias=False), "bailingmoe2: it has moe.bias=False"),
        (mixture(SQUARE, SQUARE, shared_ffn_hidden_size=0), "bailingmoe2: it has no shared expert"),
        (mixture(SQUARE, SQUARE, shared_ffn_hidden_size=25), "its shared expert of width 25 is no multiple"),
    ],
)
def test_mixtures_that_no_graph_computes_are_refused(shape: ModelRecipe, reason: str) -> None:
    with pytest.raises(ValueError, match=r"llama\.cpp has no architecture that computes this model") as raised:
        choose_architecture(shape)
    assert reason in str(raised.value)
    assert "qwen2" not in str(raised.value)
    assert "--format bd3" in str(raised.value)


WIDE = ModelRecipe(
    num_layers=16, hidden_size=256, num_attention_heads=8, num_query_groups=4, ffn_hidden_size=512,
    moe=MoeRecipe(num_experts=16, top_k=2, ffn_hidden_size=256),
)  # fmt: skip
EIGHT = mixture(WIDE, WIDE, num_experts=8)


@pytest.mark.parametrize("kind", FILE_TYPES)
def test_a_tensor_of_experts_has_the_type_of_a_dense_one(kind: str) -> None:
    def chosen(part: str, layer: int, model: ModelRecipe = WIDE) -> str:
        return tensor_type(f"blk.{layer}.{part}.weight", (16, 64, 256), layer, kind, model, importance=False)

    for layer in range(16):
        for part in ("ffn_gate", "ffn_up", "ffn_down"):
            assert chosen(f"{part}_exps", layer) == chosen(f"{part}_shexp", layer) == chosen(part, layer)
        assert chosen("attn_qkv", layer) == chosen("attn_v", layer)
        assert chosen("ffn_gate_inp", layer) == "F32"
    # The rules are those of Mixtral.
    default = FILE_TYPES[kind][1]
    more = {"q2_k": "Q5_K", "q3_k_m": "Q5_K", "q4_k_m": "Q5_K"}
    plain = default in ("F32", "F16", "BF16")
    assert chosen("attn_v", 3, EIGHT) == chosen("attn_k", 3, EIGHT) == (default if plain else "Q8_0")
    assert chosen("attn_output", 3, EIGHT) == more.get(kind, default)
    assert chosen("ffn_down_exps", 5, EIGHT) == chosen("ffn_down", 5)


def written(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: tensor.data.copy() for tensor in gguf.GGUFReader(path).tensors}


def test_each_expert_is_rounded_by_the_rows_that_it_met(topics: Path, tmp_path: Path) -> None:
    """Check that an expert with few rows is rounded without an importance matrix, and that this is reported."""
    shape = mixture(QWEN_SHAPE, SDAR_MOE_SHAPE, ffn_hidden_size=32).model_copy(
        update={"hidden_size": 64, "num_attention_heads": 4}
    )
    checkpoint = native_checkpoint(tmp_path / "n" / "native", shape, BYTES)
    plan = plan_gguf(checkpoint, "q4_0", importance=True)
    with open_model(checkpoint, torch.float32) as (native, manifest, _):
        data = DataRecipe(path=str(topics), seq_len=64)
        found = importance_matrix(native, Calibration(native, data, manifest.trained_objective(), 16))
        write_gguf(plan, tmp_path / "plain.gguf")
        # These experts have too few rows.
        few = {(0, 1): 0, (1, 2): LEAST_ROWS_OF_SQUARES - 1}
        for (layer, expert), rows in few.items():
            for linear in ("mlp.experts.linear_fc1", "mlp.experts.linear_fc2"):
                found[layer, linear][expert].rows = rows
        write_gguf(plan, tmp_path / "calibrated.gguf", found)
    assert undersampled_weights(found) == {
        f"layers.{layer}.experts.{expert}": rows for (layer, expert), rows in few.items()
    }
    plain, calibrated = written(tmp_path / "plain.gguf"), written(tmp_path / "calibrated.gguf")
    with TensorReader(checkpoint) as reader:
        for tensor in (t for t in plan.tensors if "exps" in t.name):
            values, kind = tensor.read(reader), plan.types[tensor.name]
            for expert in range(4):
                total: SquareSum = found[tensor.layer, linear_of(tensor.name)][expert]
                weights = None if (tensor.layer, expert) in few else total.squares
                assert np.array_equal(calibrated[tensor.name][expert], encoded(values[expert], kind, weights))
                same = np.array_equal(calibrated[tensor.name][expert], plain[tensor.name][expert])
                assert same == ((tensor.layer, expert) in few), (tensor.name, expert)


def test_experts_that_met_few_rows_are_told(topics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = native_checkpoint(
        tmp_path / "n" / "native", mixture(QWEN_SHAPE, SDAR_MOE_SHAPE, num_experts=64), BYTES
    )
    plan = plan_gguf(checkpoint, "q4_0", importance=True)
    data = DataRecipe(path=str(topics), seq_len=64)
    report = run_gguf_export(plan, tmp_path / "out", GgufOptions(data, 4, sequences=0, draws=1))
    # 512 rows of layer 0 and 256 of layer 1, two experts each, are far from even.
    assert 8 < len(report.seldom) < 128
    assert max(report.seldom.values()) < LEAST_ROWS_OF_SQUARES
    show_gguf(report, tmp_path / "out" / plan.name)
    said = " ".join(capsys.readouterr().out.split())
    name = next(iter(report.seldom))
    assert f"rounded without the importance matrix: {name}, " in said
    assert f"and {len(report.seldom) - 8} more saw {min(report.seldom.values())} to " in said
    kept = json.loads((tmp_path / "out" / "gguf_report.json").read_text())["seldom"]
    assert kept == report.seldom


@pytest.mark.slow
@pytest.mark.parametrize("shape", [WIDE, mixture(WIDE, SQUARE)], ids=["qwen3moe", "bailingmoe2"])
def test_every_type_runs(shape: ModelRecipe, tmp_path: Path) -> None:
    """Check every type, although rounding also sends some rows to other experts."""
    small = shape.model_copy(update={"num_layers": 4, "init_std": 0.06})
    checkpoint = native_checkpoint(tmp_path / "n" / "native", small, BYTES)
    for kind in FILE_TYPES:
        plan = plan_gguf(checkpoint, kind, importance=False)
        report = run_gguf_export(plan, tmp_path / kind, NOTHING)
        assert report.bytes_after >= plan.num_bytes
        with both(checkpoint, tmp_path / kind / plan.name) as (_, model):
            (found,) = generate_batch(model, [[1, 2, 3]], block_size=K, max_new_tokens=9, min_entropy=0.0)
            assert found.tokens


@pytest.mark.slow
@pytest.mark.parametrize("shape", [SDAR_MOE_SHAPE, SQUARE], ids=["qwen3moe", "bailingmoe2"])
def test_the_command_line_writes_evaluates_and_generates(shape: ModelRecipe, tmp_path: Path) -> None:
    checkpoint, out = native_checkpoint(tmp_path / "n" / "native", shape, BYTES), tmp_path / "out"

    def told(*arguments: object) -> Any:
        found = CliRunner().invoke(app, [*map(str, arguments), "--json"])
        assert found.exception is None, found.output
        return json.loads(found.stdout)

    (tmp_path / "texts").mkdir()
    for number, text in enumerate(list(pydoc_data.topics.topics.values())[:12]):
        (tmp_path / "texts" / f"{number}.txt").write_text(text[:2000])
    data = tmp_path / "data"
    prepare([tmp_path / "texts"], data, load_tokenizer("bytes"), 128, holdout=0.2, workers=1, progress=False)
    report = told("convert", "export", checkpoint, "--format", "gguf", "--type", "f32", "--out", out,
                  "--data", data, "--sequences", 4, "--draws", 2)  # fmt: skip
    assert report["change"]["nelbo"] == pytest.approx(0, abs=1e-5)
    assert all(at["same_token"] == 1.0 and at["divergence"] < 1e-8 for at in report["rates"])
    file = out / "native-f32.bd3.gguf"
    sampling = ("--prompt", "ab", "--max-new-tokens", 12, "--min-entropy", 0)
    mine, theirs = (told("generate", path, *sampling)["text"] for path in (checkpoint, file))
    assert mine == theirs
    (tmp_path / "text.txt").write_text("Of barges and canals. " * 20)
    bounds = [told("evaluate", path, "--text", tmp_path / "text.txt", "--draws", 2) for path in (checkpoint, file)]
    assert bounds[1][0]["nelbo"] == pytest.approx(bounds[0][0]["nelbo"], rel=1e-5)
    assert report["architecture"] in json.dumps(told("convert", "inspect", file))
