"""Check exports: their content, what transformers computes with them in a new process, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bd3_scale.attention.spans import make_spans
from bd3_scale.checkpoint.manifest import read_manifest
from bd3_scale.checkpoint.model import open_model
from bd3_scale.checkpoint.tensors import TensorReader
from bd3_scale.convert import export_files
from bd3_scale.convert.architectures import export_obstacles
from bd3_scale.convert.export import plan_export, run_export
from bd3_scale.convert.importer import plan_import, run_import
from bd3_scale.convert.serving import Packing, engines, launch_lines
from bd3_scale.objective import NextToken
from tests.convert.models import (
    BYTES,
    LLADA2_SHAPE,
    LLAMA_SHAPE,
    MIXTURE_SHAPE,
    OFFICIAL_SHAPE,
    QWEN_SHAPE,
    SDAR_MOE_SHAPE,
    TIED,
    config,
    native_checkpoint,
    save_folder,
    sdar_folder,
    tensors,
    transformers_model,
)
from tests.generate.sampling import generate

REPOSITORY = Path(__file__).parents[2]
SHAPES = {"sdar": QWEN_SHAPE, "tied": TIED, "official": OFFICIAL_SHAPE, "llama": LLAMA_SHAPE}
SHAPES |= {"sdar_moe": SDAR_MOE_SHAPE, "llada2": LLADA2_SHAPE, "mixture": MIXTURE_SHAPE}


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save native checkpoints of several shapes."""
    folder = tmp_path_factory.mktemp("native")
    return {name: native_checkpoint(folder / name, shape, BYTES) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def exported(native: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exported")
    for name, checkpoint in native.items():
        run_export(plan_export(checkpoint), folder / name, check=False)
    return {name: folder / name for name in native}


def native_results(checkpoint: Path, ids: torch.Tensor) -> dict:
    """Return logits of a clean forward, and greedy generation by confidence from prompts of several lengths."""
    manifest = read_manifest(checkpoint)
    block_size = manifest.block_size
    positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    with open_model(checkpoint) as (model, _, _), torch.no_grad():
        spans = make_spans(torch.zeros(ids.shape, dtype=torch.int32), block_size)
        logits = model.clean_logits(ids, positions, spans)
        samples = []
        for length in (8, 9, 3):
            for rule in ({"unmasking": "static", "steps": 2}, {"unmasking": "dynamic", "threshold": 0.05}):
                sample = generate(
                    model,
                    ids[0, :length].tolist(),
                    block_size=block_size,
                    max_new_tokens=13,
                    temperature=0,
                    min_entropy=0.0,
                    **rule,
                )
                samples.append({"length": length, "rule": rule, "tokens": sample.tokens})
    return {"ids": ids, "logits": logits, "samples": samples, "eos": manifest.vocabulary.eos_id}


@pytest.mark.launch
@pytest.mark.parametrize("version", ["4", pytest.param("5", marks=pytest.mark.slow)])
def test_a_fresh_process_of_transformers_computes_the_same(
    version: str, native: dict[str, Path], exported: dict[str, Path], tmp_path: Path
) -> None:
    ids = torch.randint(0, 256, (2, 21), generator=torch.Generator().manual_seed(1))
    run_export(plan_export(native["sdar"], mask_id=300), tmp_path / "moved", check=False)
    cases = {name: (checkpoint, exported[name], 257) for name, checkpoint in native.items()}
    for name, (checkpoint, folder, mask_id) in (cases | {"moved": (native["sdar"], tmp_path / "moved", 300)}).items():
        expected = native_results(checkpoint, ids) | {"folder": str(folder), "mask_id": mask_id}
        torch.save(expected, tmp_path / f"{name}.pt")
    other = REPOSITORY / ".venv" / "transformers-5"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf")}
    if version == "5":
        assert other.is_dir(), "`make install` puts transformers 5 there"
        environment["PYTHONPATH"] = str(other)
    program = Path(__file__).parent / "load_exported.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", program, version, *map(str, sorted(tmp_path.glob("*.pt")))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.count("equal") == len(native) + 1


def test_sdar_comes_back_as_it_went_in(tmp_path: Path) -> None:
    source = sdar_folder(tmp_path / "sdar")
    run_import(plan_import(source), tmp_path / "native")
    run_export(plan_export(tmp_path / "native"), tmp_path / "back", check=False)
    before, after = tensors(source), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert config(source).items() <= config(tmp_path / "back").items()
    for name in ("generation_config.json", "modeling_sdar.py", "configuration_sdar.py"):
        before_text, after_text = ((folder / name).read_text() for folder in (source, tmp_path / "back"))
        same = json.loads(before_text) == json.loads(after_text) if name.endswith("json") else before_text == after_text
        assert same, name
    assert (tmp_path / "back" / "sglang.yaml").read_text() == "block_size: 4\nthreshold: 0.9\n"


@pytest.mark.parametrize("name", SHAPES)
def test_native_comes_back_bitwise(
    name: str, native: dict[str, Path], exported: dict[str, Path], tmp_path: Path
) -> None:
    """Check that the moving average replaces the master weights and that the padded vocabulary rows are zero."""
    run_import(plan_import(exported[name]), tmp_path / "back")
    old, new = read_manifest(native[name]), read_manifest(tmp_path / "back")
    assert new.model.model_dump(exclude={"init_std", "head_dim"}) == old.model.model_dump(
        exclude={"init_std", "head_dim"}
    ) | {"num_query_groups": old.model.query_groups}
    assert new.vocabulary.model_dump(exclude={"rows"}) == old.vocabulary.model_dump(exclude={"rows"})
    with TensorReader(native[name]) as one, TensorReader(tmp_path / "back") as two:
        keys = [key.removeprefix("ema.") for key in one.shapes if key.startswith("ema.")]
        assert {f"master.{key}" for key in keys} == two.shapes.keys()
        for key in keys:
            shape = one.shapes[f"ema.{key}"]
            zeros = (0,) * len(shape)
            a, b = one.read(f"ema.{key}", zeros, shape), two.read(f"master.{key}", zeros, shape)
            in_use = slice(BYTES.size) if shape[0] == BYTES.padded_size else slice(None)
            assert torch.equal(a[in_use], b[in_use]), key


def test_shards_and_casts(native: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_files, "SHARD_BYTES", 30_000)
    run_export(plan_export(native["tied"], dtype="bfloat16"), tmp_path / "out", check=False)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    found = tensors(tmp_path / "out")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert config(tmp_path / "out")["torch_dtype"] == "bfloat16"
    embedding, head = found["model.embed_tokens.weight"], found["lm_head.weight"]
    assert torch.equal(embedding[:257], head[:257]), "a tied head is written"
    # But for the mask, which an engine may draw: its logit is the mean of the others, and never the largest.
    assert torch.equal(head[257], embedding[:257].float().mean(0).bfloat16())


def test_the_head_of_a_trained_model_cannot_favour_the_mask(exported: dict[str, Path], native: dict[str, Path]) -> None:
    with TensorReader(native["sdar"]) as reader:
        assert not reader.read("master.output_layer.weight", (257, 0), (127, 48)).any()
        assert reader.read("master.output_layer.weight", (256, 0), (1, 48)).any()


def test_config_has_what_engines_read(exported: dict[str, Path]) -> None:
    found = config(exported["sdar"])
    assert found["architectures"] == ["SDARForCausalLM"]
    assert found["model_type"] == "sdar"
    keys = {"head_dim": 12, "rope_theta": 10000, "rope_scaling": None, "sliding_window": None, "pad_token_id": 256}
    keys |= {"fuse_cross_entropy": True, "torch_dtype": "float32", "block_size": 4, "mask_token_id": 257}
    keys |= {"tie_word_embeddings": False, "vocab_size": 258, "num_key_value_heads": 2, "max_position_embeddings": 128}
    assert keys.items() <= found.items()
    tokenizer = json.loads((exported["sdar"] / "tokenizer_config.json").read_text())
    assert tokenizer["mask_token"] == "[MASK]"
    assert (tokenizer["pad_token"], tokenizer["padding_side"]) == ("<|endoftext|>", "left")
    generation = json.loads((exported["sdar"] / "generation_config.json").read_text())
    ids = {"bos_token_id": None, "eos_token_id": 256, "pad_token_id": 256}
    assert generation == ids | {"do_sample": True, "temperature": 1.0, "top_k": 258, "top_p": 1.0}
    card = (exported["sdar"] / "README.md").read_text()
    for words in ("block_size: 4", "num_layers: 2", "`--mask-id 151669` moves it there"):
        assert words in card
    for name in ("sdar", "official"):
        assert "`transformers serve` does not work (4.57 and 5.24)" in (exported[name] / "README.md").read_text()
    assert "--dllm" not in card, "how to launch what does not run it"
    assert config(exported["official"])["architectures"] == ["Bd3ForCausalLM"]
    assert config(exported["llama"])["rope_scaling"]["rope_type"] == "llama3"


def test_which_engines_run_it() -> None:
    assert {e.name: e.runs for e in engines("sdar", 151669)}["SGLang"]
    by_name = {e.name: e for e in engines("sdar", 257)}
    assert not by_name["SGLang"].runs
    assert "it takes 151669" in by_name["SGLang"].reason
    assert "here the mask has the id 257" in by_name["SGLang"].reason
    assert by_name["JetEngine, Diffulex"].runs
    assert not by_name["llama.cpp"].runs


def test_which_engines_run_packed_weights() -> None:
    packed = {e.name: e for e in engines("sdar", 151669, Packing("int4", ()))}
    assert {name for name, engine in packed.items() if engine.runs} == {"transformers", "SGLang"}
    assert "not compressed-tensors" in packed["LMDeploy"].reason
    odd = {e.name: e for e in engines("sdar", 151669, Packing("int4", ("down: groups of 16",)))}
    assert not odd["SGLang"].runs
    assert "down: groups of 16" in odd["SGLang"].reason
    lines = launch_lines(4, tuple(packed.values()))
    assert "--max-running-requests" in lines
    assert "lmdeploy" not in lines
    assert launch_lines(4, tuple(odd.values())) == ""


def test_formats_that_a_model_cannot_become(native: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"cannot become Qwen3ForCausalLM: .*\[MASK\] row .* it can become sdar or bd3"
    ):
        plan_export(native["sdar"], "qwen3")
    with pytest.raises(
        ValueError, match=r"SDARForCausalLM: it has no q/k norm, and a norm of unit weights is not the id"
    ):
        plan_export(native["llama"], "sdar")
    with pytest.raises(ValueError, match=r"SDARForCausalLM: it has no q/k norm"):
        plan_export(native["official"], "sdar")
    source = save_folder(tmp_path / "source", transformers_model("Qwen3", vocab_size=257))
    run_import(plan_import(source), tmp_path / "imported")
    with pytest.raises(ValueError, match=r"trained to predict the next token; adapt it to block diffusion first"):
        plan_export(tmp_path / "imported", "sdar")
    llama = plan_import(save_folder(tmp_path / "llama", transformers_model("Llama", vocab_size=257)))
    assert "no q/k norm" in export_obstacles(llama.model, NextToken)["sdar"], "known before anyone adapts it"
    with pytest.raises(ValueError, match=r"cannot become LlamaForCausalLM: it has q/k norm; it can become qwen3"):
        plan_export(tmp_path / "imported", "llama")


def test_an_existing_destination_is_kept(native: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(FileExistsError, match="exists"):
        run_export(plan_export(native["sdar"]), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "precious").read_text() == "x"


def test_a_damaged_checkpoint_is_refused(native: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    checkpoint = shutil.copytree(native["sdar"], tmp_path / "damaged")
    file = checkpoint / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"rank-00000\.safetensors has \d+ bytes"):
        plan_export(checkpoint)
