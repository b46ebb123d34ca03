"""Turn a folder of transformers into a served block diffusion model, only through the command line."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner

from bd3_scale.checkpoint.folder import resolve_checkpoint
from bd3_scale.checkpoint.model import open_model
from bd3_scale.checkpoint.tensors import TensorReader
from bd3_scale.cli import app
from bd3_scale.convert.calibration import Calibration
from bd3_scale.convert.compressed import unpacked_weight
from bd3_scale.convert.names import named_tensors
from bd3_scale.convert.quantize import REPORT, is_quantized
from bd3_scale.convert.quantizer import Scheme
from bd3_scale.data.manifest import load_manifest
from bd3_scale.data.prepare import prepare
from bd3_scale.data.stream import held_out_batches
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.parallel.groups import process_groups
from bd3_scale.recipe.schema import DataRecipe, ParallelRecipe
from tests.convert.models import config, save_folder, tensors, transformers_model
from tests.support import forks
from tests.support.programs import BD3_SCALE
from tests.support.recipes import tiny_recipe, write_topics
from tests.support.runs import losses, wait_for

STEPS = 10
MODEL = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32, "num_hidden_layers": 2}
RECIPE = tiny_recipe(
    name="adapt",
    diffusion={
        "block_size_schedule": [{"block_size": 1, "steps": 3}, {"block_size": 16, "steps": 4}],
        "mask_rate_low": 0.2,
        "noisy_copies": 2,
        "mask_noise_std": 0.1,
        "mask_noise_steps": 4,
    },
    train={"steps": STEPS},
    parallel={"tensor": 2},
    evaluation={"every_steps": 5, "sequences": 8},
    checkpoint={"every_steps": 5},
)
del RECIPE["model"]  # the source gives the model


def command(folder: Path, *arguments: object) -> dict:
    """Run a command in this process, where everything is imported, and return the JSON that it prints."""
    with contextlib.chdir(folder):
        done = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def adapt(run: str) -> list[str]:
    return ["adapt", "model", "adapt.yaml", "--text", "text", f"run_dir={run}"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with text, a model of transformers, a recipe, and the finished run `whole`."""
    folder = tmp_path_factory.mktemp("adapt")
    write_topics(folder / "text")
    save_folder(folder / "model", transformers_model("Qwen3", vocab_size=257, num_key_value_heads=2, **MODEL))
    shutil.copytree(folder / "model", folder / "other")
    load_tokenizer("bytes").save(folder / "tokenizer")
    edited = (folder / "tokenizer" / "tokenizer.json").read_text().replace("<|endoftext|>", "<|end|>")
    (folder / "tokenizer" / "tokenizer.json").write_text(edited)
    config_file = folder / "tokenizer" / "tokenizer_config.json"
    config_file.write_text(config_file.read_text().replace("<|endoftext|>", "<|end|>"))
    prepare([folder / "text"], folder / "otherdata", load_tokenizer(folder / "tokenizer"), 64, progress=False)
    own = folder / "model" / "tokenizer_config.json"
    foreign = {"auto_map": {"AutoTokenizer": ["somebody/odd--odd.Odd", None], "AutoConfig": "somebody/odd--odd.Odd"}}
    own.write_text(json.dumps(json.loads(own.read_text()) | foreign | {"chat_template": "{{ messages }}"}))
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / "model" / name).read_text())
        (folder / "model" / name).write_text(json.dumps(content | foreign))
    (folder / "adapt.yaml").write_text(yaml.safe_dump(RECIPE))
    forks.bd3_scale(*adapt("whole"), cwd=folder)
    return folder


def test_the_run_began_with_the_import(workplace: Path) -> None:
    recipe = yaml.safe_load((workplace / "whole" / "adapt.yaml").read_text())
    assert recipe["init_from"] == "whole/initial"
    assert recipe["model"]["hidden_size"] == 128
    assert sorted(losses(workplace / "whole")) == list(range(1, STEPS + 1))
    log = (workplace / "whole" / "logs" / "rank0.log") if (workplace / "whole" / "logs").is_dir() else None
    assert log is None or not log.exists() or "from the weights of whole/initial" in log.read_text()
    manifest = json.loads((workplace / "data" / "manifest.json").read_text())
    assert manifest["document_multiple"] % 16 == 0
    assert manifest["vocabulary"] == {"size": 258, "eos_id": 256, "mask_id": 257, "rows": 0}


def test_its_weights_are_those_of_the_model_a_little_further(workplace: Path) -> None:
    checkpoint = workplace / "whole" / "checkpoints" / "step-00000010"
    with TensorReader(workplace / "whole" / "initial") as before, TensorReader(checkpoint) as after:
        for key in ("decoder.layers.mlp.linear_fc1.weight", "embedding.word_embeddings.weight"):
            name, shape = f"master.{key}", before.shapes[f"master.{key}"]
            old, new = (reader.read(name, (0,) * len(shape), shape) for reader in (before, after))
            assert 0 < (new - old).norm() / old.norm() < 0.2


def test_an_import_has_the_likelihood_that_transformers_gives(workplace: Path) -> None:
    """Check each document without its first token, which nothing predicts."""
    (found,) = command(workplace, "evaluate", "whole/initial", "--data", "data", "--sequences", 6)
    assert found["exact"]
    model = transformers_model("Qwen3", vocab_size=257, num_key_value_heads=2, **MODEL)
    total, count = 0.0, 0
    with process_groups(ParallelRecipe()), torch.no_grad():
        data = DataRecipe(path=str(workplace / "data"), seq_len=64)
        for batch in held_out_batches(data, load_manifest(data.path), batch_size=6, dp_rank=0, dp_size=1, sequences=6):
            for tokens, starts, counted in zip(batch.tokens, batch.document_start, batch.counted, strict=True):
                for start in starts.unique():
                    here = starts == start
                    ids = tokens[here]
                    nll = -model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
                    total += float((nll * counted[here][1:]).sum())
                    count += int(counted[here][1:].sum())
    assert found["tokens"] == count
    assert found["nelbo"] == pytest.approx(total / count, rel=1e-5)


def test_killed_and_repeated_it_goes_on_bitwise(workplace: Path) -> None:
    process = forks.Program([BD3_SCALE, *adapt("killed")], cwd=workplace)
    try:
        wait_for(lambda: process.poll() is not None or max(losses(workplace / "killed"), default=0) >= 6)
        assert process.poll() is None, process.output()
    finally:
        process.end()
    assert "resumed after step 5" in forks.bd3_scale(*adapt("killed"), cwd=workplace)
    assert losses(workplace / "killed") == losses(workplace / "whole")


def test_it_is_exported_inspected_and_measured(workplace: Path) -> None:
    said = command(workplace, "convert", "export", "whole", "--out", "served", "--dry-run")
    assert said["result"] == "would write served"
    assert not (workplace / "served").exists()
    said = command(workplace, "convert", "export", "whole", "--out", "served")
    assert said["format"] == "SDARForCausalLM"
    assert said["SGLang"].startswith("does not run it: it takes 151669")
    assert config(workplace / "served")["block_size"] == 8
    assert json.loads((workplace / "served" / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"
    for folder in ("whole", "served"):
        files = [path for path in (workplace / folder).rglob("*.json") if path.is_file()]
        assert len(files) >= 4
        assert [path for path in files if "somebody" in path.read_text()] == [], "code that the source names"
    assert command(workplace, "convert", "inspect", "whole", "--verify")["sound"]
    (evaluated,) = command(workplace, "evaluate", "whole", "--sequences", 8)
    command(workplace, "convert", "import", "served", "--out", "again")
    (again,) = command(workplace, "evaluate", "again", "--data", "data", "--sequences", 8)
    assert again["nelbo"] == pytest.approx(evaluated["nelbo"], rel=1e-6)
    written = command(workplace, "generate", "again", "--prompt", "The", "--max-new-tokens", 9)
    assert written["nfe"] >= len(written["tokens"])
    with pytest.raises(FileExistsError, match="served exists; remove it or choose another folder"):
        command(workplace, "convert", "export", "whole", "--out", "served")
    with pytest.raises(ValueError, match="name prepared data with --data"):
        command(workplace, "evaluate", "again")


@pytest.mark.slow
def test_it_is_adapted_to_several_sources_once_all_are_prepared(workplace: Path) -> None:
    sources = [{"name": "a", "path": "data", "weight": 0.5}, {"name": "b", "path": "more", "weight": 0.5}]
    data = {"seq_len": 64, "num_workers": 0, "sources": sources}
    (workplace / "mixed.yaml").write_text(yaml.safe_dump(RECIPE | {"data": data}))
    asked = ["adapt", "model", "mixed.yaml", "--text", "text", "run_dir=mixed"]
    said = " ".join(forks.bd3_scale(*asked, cwd=workplace, returncode=2).split())
    assert "error: more of data.sources hold no prepared data" in said
    assert not (workplace / "mixed/initial").exists()
    # The message names this way out.
    assert "`bd3-scale convert import model --out mixed/initial`" in said
    forks.bd3_scale("convert", "import", "model", "--out", "mixed/initial", cwd=workplace)
    assert "`bd3-scale data prepare --tokenizer mixed/initial/tokenizer`" in said
    options = ["--out", "more", "--tokenizer", "mixed/initial/tokenizer", "--seq-len", 64, "--holdout", 0.1]
    forks.bd3_scale("data", "prepare", "text", *options, cwd=workplace)
    forks.bd3_scale(*asked, cwd=workplace)
    assert sorted(losses(workplace / "mixed")) == list(range(1, STEPS + 1))
    assert yaml.safe_load((workplace / "mixed" / "adapt.yaml").read_text())["data"]["sources"][1]["path"] == "more"


@pytest.mark.parametrize("bits", [4, 8])
def test_it_is_quantised(bits: int, workplace: Path) -> None:
    out = f"int{bits}"
    numbers = ["--calibration-sequences", 8, "--sequences", 8, "--draws", 2]
    report = command(workplace, "convert", "quantize", "whole", "--bits", bits, "--out", out, *numbers)
    assert report["method"] == {4: "gptq", 8: "rtn"}[bits]
    assert len(report["errors"]) == 2 * 7
    assert min(report["errors"].values()) > 0
    assert max(report["errors"].values()) < {4: 0.05, 8: 1e-3}[bits]
    assert report["notes"] == []
    assert report["SGLang"].startswith("does not run it: it takes 151669")
    assert "not compressed-tensors" in report["LMDeploy"]
    found = tensors(workplace / out)
    assert report["bytes_after"] == sum(tensor.nbytes for tensor in found.values())
    packed = found["model.layers.0.mlp.up_proj.weight_packed"]
    assert packed.dtype == torch.int32
    assert packed.shape == (128, 128 * bits // 32)
    assert report["after"]["nelbo"] == pytest.approx(report["before"]["nelbo"], rel={4: 0.05, 8: 0.01}[bits])
    assert report["after"]["nelbo"] != report["before"]["nelbo"]


@pytest.mark.slow
def test_it_is_quantised_with_its_mask_where_engines_look(workplace: Path) -> None:
    """Check that transformers loads the folder and compares it with the model before it is kept."""
    numbers = ["--calibration-sequences", 2, "--sequences", 2, "--draws", 1, "--bits", 8, "--mask-id", 151669]
    report = command(workplace, "convert", "quantize", "whole", "--out", "moved", *numbers)
    assert report["SGLang"].startswith("runs it: the mask has the id 151669")
    found = tensors(workplace / "moved")
    assert found["model.embed_tokens.weight"].shape == found["lm_head.weight"].shape == (151670, 128)
    assert found["model.embed_tokens.weight"][151669].any()
    assert config(workplace / "moved")["num_token_ids"] == 257
    card = (workplace / "moved" / "README.md").read_text()
    assert "sglang.launch_server" in card
    assert "lmdeploy serve" not in card


def test_gptq_loses_less_and_goes_layer_by_layer(workplace: Path) -> None:
    """Check the reported error of a weight in the second layer, whose inputs come from the first layer as written."""
    numbers = ["--calibration-sequences", 8, "--sequences", 8, "--draws", 2]
    command(workplace, "convert", "quantize", "whole", "--method", "rtn", "--out", "rtn", *numbers)
    gptq, rtn = (json.loads((workplace / out / REPORT).read_text())["errors"] for out in ("int4", "rtn"))
    assert sum(gptq.values()) < 0.8 * sum(rtn.values())

    found, scheme, down = tensors(workplace / "int4"), Scheme(4), "model.layers.1.mlp.down_proj"
    with contextlib.chdir(workplace), open_model(resolve_checkpoint(Path("whole"))) as (model, manifest, _):
        parameters = dict(model.named_parameters())
        for parameter in parameters.values():
            parameter.data = parameter.data.bfloat16().float()
        weight = parameters["decoder.layers.1.mlp.linear_fc2.weight"].data.clone()
        for tensor in named_tensors(manifest.model, vocab_rows=258, padded_rows=384, tied=False):
            if is_quantized(tensor) and ".layers.0." in tensor.name:
                written = unpacked_weight(found, tensor.name.removesuffix(".weight"), scheme).float()
                target = parameters[tensor.key.replace("decoder.layers.", "decoder.layers.0.")].data
                for (_, row, _), rows in tensor.split(written):
                    target[row : row + rows.shape[1]] = rows[0]
        calibration = Calibration(model, manifest.trained_data(), manifest.trained_objective(), 8)
        calibration.advance(0)
        hessian = calibration.hessians(1)["mlp.linear_fc2"][0].hessian
    difference = weight - unpacked_weight(found, down, scheme).float()
    error = ((difference @ hessian) * difference).sum() / ((weight @ hessian) * weight).sum()
    assert float(error) == pytest.approx(gptq[f"{down}.weight"], rel=1e-3)


def test_transformers_runs_the_quantised_export(workplace: Path, tmp_path: Path) -> None:
    """Check that dequantised weights in a folder without quantisation compute the same as the packed folder."""
    packed, plain = workplace / "int4", shutil.copytree(workplace / "int4", tmp_path / "plain")
    scheme, found = Scheme(4), tensors(packed)
    names = [name.removesuffix("_packed") for name in found if name.endswith("_packed")]
    kept = {n: t for n, t in found.items() if "weight_" not in n}
    unpacked = {n: unpacked_weight(found, n.removesuffix(".weight"), scheme) for n in names}
    save_file(kept | unpacked, plain / "model.safetensors", metadata={"format": "pt"})
    (plain / "config.json").write_text(
        json.dumps({k: v for k, v in config(packed).items() if k != "quantization_config"})
    )
    program = Path(__file__).parents[1] / "convert" / "same_logits.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", program, packed, plain],
        env=os.environ | {"HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "equal" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adapt", "missing", "adapt.yaml", "--text", "text"], "missing does not exist"),
        (["adapt", "model", "adapt.yaml", "data.path=nothing"], "holds no prepared data: give the text to train on"),
        (
            ["adapt", "model", "adapt.yaml", "--text", "text", "train.steps=5"],
            "diffusion.block_size_schedule takes 7 steps of train.steps=5",
        ),
        (
            ["adapt", "model", "adapt.yaml", "--text", "text", "model.num_layers=3"],
            "model: is decided by the model that is",
        ),
        (["adapt", "model", "adapt.yaml", "--text", "elsewhere", "data.path=d"], "elsewhere does not exist"),
        (["adapt", "other", "adapt.yaml", "run_dir=whole"], "was imported from Qwen3ForCausalLM, model"),
        (
            ["generate", "whole/initial"],
            "was trained for next_token and fills no masks, but generation here is block diffusion",
        ),
        (
            ["convert", "quantize", "whole", "--out", "x", "--data", "otherdata"],
            "is not the one that the data was prepared",
        ),
        (["convert", "inspect", "text"], "is neither a checkpoint nor a run directory"),
        (["convert", "quantize", "whole", "--out", "x", "--group-size", "96"], "must divide into groups of 96"),
        (["convert", "quantize", "whole", "--out", "x", "--group-size", "4"], "does not fill whole words of 8 values"),
    ],
)
def test_bad_input_is_refused_before_any_work(arguments: list[str], message: str, workplace: Path) -> None:
    before = sorted(path.name for path in workplace.iterdir())
    with contextlib.chdir(workplace), pytest.raises((ValueError, OSError), match=message):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert sorted(path.name for path in workplace.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adapt", "model", "adapt.yaml"], "run it without a launcher and with --prepare-only"),
        (["convert", "inspect", "whole"], "conversions run in one process"),
    ],
)
def test_what_runs_in_one_process_refuses_a_launcher(
    arguments: list[str], message: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with contextlib.chdir(workplace), pytest.raises(ValueError, match=message):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
