"""Check imports from folders of transformers: their result, and that every bad folder is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bd3_scale.attention.spans import make_spans
from bd3_scale.checkpoint.manifest import read_manifest
from bd3_scale.checkpoint.model import open_model
from bd3_scale.checkpoint.tensors import TensorReader, same_bytes
from bd3_scale.convert.export import plan_export, run_export
from bd3_scale.convert.importer import plan_import, run_import
from bd3_scale.data.tokenizer import load_tokenizer
from tests.convert.models import EXPERTS, LLAMA3_ROPE, save_folder, sdar_folder, tensors, transformers_model


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = transformers_model("Qwen3", vocab_size=257)
    return save_folder(tmp_path_factory.mktemp("qwen") / "model", model, shard="100KB")


@pytest.fixture
def folder(qwen: Path, tmp_path: Path) -> Path:
    """Copy a folder, so that a test may damage it."""
    return shutil.copytree(qwen, tmp_path / "model")


def edit_config(folder: Path, **keys: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def edit_tensors(folder: Path, edit) -> None:
    """Rewrite a sharded folder as one file, after `edit` has changed its tensors."""
    all_tensors = tensors(folder)
    edit(all_tensors)
    for path in folder.glob("model*"):
        path.unlink()
    save_file(all_tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("Qwen2", {"vocab_size": 257, "num_key_value_heads": 2}),
        ("Llama", {"vocab_size": 300, "num_key_value_heads": 1, "rope_scaling": LLAMA3_ROPE}),
        ("Llama", {"vocab_size": 257, "mlp_bias": True}),
        ("Mistral", {"vocab_size": 257, "sliding_window": None}),
        ("Qwen3", {"vocab_size": 257, "num_key_value_heads": 2, "head_dim": 24, "tie_word_embeddings": True}),
        ("Qwen3Moe", {"vocab_size": 257, "num_key_value_heads": 2, **EXPERTS}),
        ("Qwen3Moe", {"vocab_size": 260, **EXPERTS, "norm_topk_prob": False, "mlp_only_layers": [1, 0]}),
        ("Qwen3Moe", {"vocab_size": 257, **EXPERTS, "decoder_sparse_step": 4}),
    ],
)
def test_the_clean_forward_is_that_of_transformers(name: str, config: dict, tmp_path: Path) -> None:
    model = transformers_model(name, **config)
    imported = tmp_path / "imported"
    run_import(plan_import(save_folder(tmp_path / "model", model)), imported)
    ids = torch.randint(0, 257, (2, 60))
    positions = torch.arange(60).expand(2, -1)
    with open_model(imported) as (native, _, _), torch.no_grad():
        spans = make_spans(torch.zeros(2, 60, dtype=torch.int32), 1)
        found, expected = native.clean_logits(ids, positions, spans)[..., :257], model(ids).logits[..., :257]
    assert (found - expected).abs().max() / expected.abs().max() < 1e-5


def test_a_new_mask_is_as_long_as_other_embeddings_and_none_of_them(qwen: Path, tmp_path: Path) -> None:
    plan = plan_import(qwen)
    assert plan.vocabulary.model_dump() == {"size": 258, "eos_id": 256, "mask_id": 257, "rows": 257}
    run_import(plan, tmp_path / "out")
    with TensorReader(tmp_path / "out") as reader:
        embedding = reader.read("master.embedding.word_embeddings.weight", (0, 0), (384, 48))
        head = reader.read("master.output_layer.weight", (0, 0), (384, 48))
    lengths = embedding[:257].norm(dim=1)
    assert lengths.min() < embedding[257].norm() < lengths.max()
    assert (embedding[:257] - embedding[257]).norm(dim=1).min() > 0.1 * lengths.mean()
    assert not embedding[258:].any()
    assert not head[257:].any()
    assert load_tokenizer(tmp_path / "out" / "tokenizer").vocabulary.mask_id == 257


def test_an_unused_token_can_become_the_mask(folder: Path) -> None:
    edit_config(folder, vocab_size=258)
    edit_tensors(folder, lambda t: t.update({k: torch.nn.functional.pad(t[k], (0, 0, 0, 1)) for k in
                                             ("model.embed_tokens.weight", "lm_head.weight")}))  # fmt: skip
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    reserved = {**tokenizer["added_tokens"][-1], "id": 257, "content": "<|reserved|>"}
    tokenizer["added_tokens"][-1] = reserved
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"mask_token": None, "chat_template": "{{ x }}"}))
    assert plan_import(folder, mask_token="<|reserved|>").vocabulary.mask_id == 257
    assert plan_import(folder).vocabulary.mask_id == 258, "a new one comes behind all known tokens"
    out = folder.parent / "out"
    run_import(plan_import(folder, mask_token="<|reserved|>"), out)
    assert json.loads((out / "tokenizer" / "tokenizer_config.json").read_text())["chat_template"] == "{{ x }}"
    with pytest.raises(ValueError, match="would become that special token"):
        plan_import(folder, mask_token="e")


def test_bf16_stays_bf16(folder: Path) -> None:
    def cast(all_tensors: dict) -> None:
        all_tensors.update({name: tensor.bfloat16() for name, tensor in all_tensors.items()})

    edit_tensors(folder, cast)
    run_import(plan_import(folder), folder.parent / "out")
    manifest = read_manifest(folder.parent / "out")
    assert manifest.precision == "bf16"
    with TensorReader(folder.parent / "out") as reader:
        assert set(reader.dtypes.values()) == {torch.bfloat16}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"'GPT2LMHeadModel' is not supported; these are: SDARForCausalLM, "),
        ({"architectures": None, "model_type": "mamba"}, r"'mamba' is not supported"),
        ({"hidden_act": "gelu"}, r"hidden_act='gelu' of Qwen3ForCausalLM is not supported; silu is"),
        ({"attention_bias": True}, r"attention_bias=true has a bias on its output projection"),
        ({"use_sliding_window": True, "sliding_window": 64}, r"sliding windows are not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, r"'yarn' is not supported; none and llama3 are"),
        ({"num_hidden_layers": 3}, r"not part of the model: model\.layers\.3\..* and 6 more"),
        ({"num_hidden_layers": 5}, r"missing: model\.layers\.4\.input_layernorm\.weight"),
        ({"intermediate_size": 65}, r"of another shape: .*gate_proj\.weight \(64, 48\), not \(65, 48\)"),
        ({"intermediate_size": 10**18}, r"intermediate_size=10+, and no tensor of its weights is as large"),
        ({"hidden_size": 2**63}, r"hidden_size=9\d+, and no tensor of its weights is as large"),
        ({"vocab_size": None}, r"has no 'vocab_size', which Qwen3ForCausalLM needs"),
        ({"hidden_size": "48"}, r"hidden_size='48' in config.json is not a whole number"),
        ({"rms_norm_eps": "small"}, r"describes no model: norm_eps: .*, not 'small'"),
        ({"num_attention_heads": 0}, r"num_attention_heads: .* not 0"),
        ({"rope_scaling": "llama3"}, r"rope_scaling='llama3' in config.json is not of the type"),
        ({"architectures": "Qwen3ForCausalLM"}, r"architectures='Qwen3ForCausalLM' .* is not of the type"),
        ({"max_position_embeddings": "long"}, r"max_position_embeddings='long' in config.json is not a whole number"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, r"rope_scaling.low_freq_factor: Field required"),
        ({"quantization_config": {"bits": 4}}, r"is quantised"),
    ],
)
def test_what_is_not_supported_is_named(folder: Path, keys: dict, message: str) -> None:
    edit_config(folder, **keys)
    with pytest.raises(ValueError, match=message):
        plan_import(folder)


def test_missing_and_extra_tensors_are_named(folder: Path) -> None:
    def edit(all_tensors: dict) -> None:
        all_tensors["model.layers.0.self_attn.extra"] = torch.zeros(3)
        all_tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(3)
        del all_tensors["model.layers.2.mlp.up_proj.weight"]

    edit_tensors(folder, edit)
    named = (
        r"missing: model\.layers\.2\.mlp\.up_proj\.weight\n.*part of the model: model\.layers\.0\.self_attn\.extra\n"
    )
    with pytest.raises(ValueError, match=named):
        plan_import(folder)


def test_a_truncated_file_a_missing_one_and_a_wrong_index(folder: Path) -> None:
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[:-10])
    with pytest.raises(ValueError, match=rf"{shards[1].name} is truncated or corrupt"):
        plan_import(folder)
    shards[1].write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="is truncated or corrupt"):
        plan_import(folder)
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=rf"lacks {shards[1].name}"):
        plan_import(folder)
    shards[1].write_bytes(content)
    index = folder / "model.safetensors.index.json"
    weights = json.loads(index.read_text())
    weights["weight_map"]["lm_head.weight"] = shards[0].name
    index.write_text(json.dumps(weights))
    with pytest.raises(ValueError, match=r"disagree about 1 tensors, such as lm_head\.weight"):
        plan_import(folder)
    weights["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(weights))
    with pytest.raises(ValueError, match="from tensor names to"):
        plan_import(folder)


def test_pickles_and_packed_weights_are_refused(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"has pytorch_model\.bin: save it again with safe_serialization"):
        plan_import(folder)
    save_file({"lm_head.weight": torch.zeros(3, dtype=torch.int8)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight is of type I8"):
        plan_import(folder)


def test_tokenisers_that_do_not_fit(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "elsewhere.json")
    with pytest.raises(ValueError, match=r"no tokenizer.json next to the weights.*--tokenizer"):
        plan_import(folder)
    assert plan_import(folder, tokenizer=str(folder / "elsewhere.json")).vocabulary.size == 258

    def narrow(all_tensors: dict) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            all_tensors[name] = all_tensors[name][:200].clone()

    edit_tensors(folder, narrow)
    edit_config(folder, vocab_size=200)
    with pytest.raises(ValueError, match="has ids up to 256, and the embedding has 200 rows"):
        plan_import(folder, tokenizer="bytes")


def test_a_mask_id_that_text_uses_is_refused(tmp_path: Path) -> None:
    folder = sdar_folder(tmp_path / "sdar", mask_token_id=65)
    with pytest.raises(ValueError, match=r"mask has the id 65, and in the tokeniser .* that id is its token 'A'"):
        plan_import(folder)
    with pytest.raises(ValueError, match="block_size=4 is for block diffusion models"):
        plan_import(save_folder(tmp_path / "qwen", transformers_model("Qwen3", vocab_size=257)), block_size=4)


def test_a_tied_head_that_differs_is_refused_and_nothing_is_left(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    plan = plan_import(folder)
    out = folder.parent / "out"
    with pytest.raises(ValueError, match=r"ties the head to the embedding, and lm_head\.weight differs"):
        run_import(plan, out)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_an_existing_destination_and_a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_import(folder)
    out = folder.parent / "out"
    out.mkdir()
    with pytest.raises(FileExistsError, match="exists; remove it or choose another folder"):
        run_import(plan, out)
    out.rmdir()
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr("bd3_scale.resilience.files.shutil.disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"GB are needed and 0\.00 GB are free"):
        run_import(plan, out)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.launch
def test_a_killed_import_leaves_nothing_that_looks_finished(qwen: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    program = (
        "import sys, time\nfrom pathlib import Path\n"
        "from bd3_scale.convert.importer import plan_import, run_import\n"
        "def slow(done, total):\n    print('.', flush=True); time.sleep(0.05)\n"
        "run_import(plan_import(Path(sys.argv[1])), Path(sys.argv[2]), slow)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(qwen), str(out)], stdout=subprocess.PIPE)
    try:
        for _ in range(60):  # more than half: the second pass compares
            process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait(timeout=30)
        process.stdout.close()
    time.sleep(0)
    left = [path.name for path in tmp_path.iterdir()]
    assert left, "it was killed in the middle"
    assert all(name.startswith(".out.") for name in left)
    run_import(plan_import(qwen), out)
    assert read_manifest(out).imported_from.startswith("Qwen3ForCausalLM")


def test_what_is_written_is_compared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a disk that flips a bit: the file changes between writing and reading."""
    from bd3_scale.convert import importer

    plan = plan_import(folder)
    whole = importer.write_manifest

    def flip(written: Path, *rest) -> None:
        file = next(written.glob("part-*.safetensors"))
        tensor = max(load_file(file).values(), key=torch.Tensor.numel)
        content = bytearray(file.read_bytes())
        at = content.find(tensor.numpy().tobytes())
        content[at] ^= 1
        file.write_bytes(content)
        whole(written, *rest)

    monkeypatch.setattr(importer, "write_manifest", flip)
    with pytest.raises(ValueError, match="reads back differently than it was written"):
        run_import(plan, folder.parent / "out")
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_transformers_5_says_rope_in_other_words(folder: Path) -> None:
    edit_config(folder, rope_theta=1e6, rope_parameters={"rope_type": "default"})
    assert plan_import(folder).model.rope_theta == 1e6
    edit_config(folder, rope_theta=None, rope_parameters={"rope_theta": 5e5, **LLAMA3_ROPE})
    model = plan_import(folder).model
    assert model.rope_theta == 5e5
    assert model.rope_scaling.factor == 8.0
    assert model.rope_scaling.original_max_position_embeddings == 32


def test_options_that_would_be_ignored_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="eos_id=3 is for models without a tokeniser"):
        plan_import(folder, eos_id=3)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="mask_token='x' names a token, and there is no tokeniser"):
        plan_import(folder, mask_token="x")
    with pytest.raises(ValueError, match="is a part of a Hugging Face folder: give the folder"):
        plan_import(folder / "model.safetensors.index.json")


def test_the_configuration_beside_another_tokeniser_is_the_one_kept(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "of the source"}))
    run_import(plan_import(folder, tokenizer="bytes"), folder.parent / "out")
    assert "chat_template" not in (folder.parent / "out" / "tokenizer" / "tokenizer_config.json").read_text()


def test_each_tensor_keeps_its_own_type_and_every_bit(folder: Path) -> None:
    """Check projections in bf16 with norms in fp32, and a weight that is NaN."""

    def cast(all_tensors: dict) -> None:
        all_tensors.update({n: t.bfloat16() for n, t in all_tensors.items() if n.endswith("_proj.weight")})
        all_tensors["model.norm.weight"][3] = float("nan")

    edit_tensors(folder, cast)
    run_import(plan_import(folder), folder.parent / "native")
    run_export(plan_export(folder.parent / "native"), folder.parent / "back", check=False)
    before, after = tensors(folder), tensors(folder.parent / "back")
    assert {n: t.dtype for n, t in before.items()} == {n: t.dtype for n, t in after.items()}
    assert all(same_bytes(before[n], after[n]) for n in before)


def test_a_flipped_bit_of_the_checkpoint_is_not_exported(folder: Path) -> None:
    run_import(plan_import(folder), folder.parent / "native")
    file = next((folder.parent / "native").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"is damaged: {file.name}; use an earlier one"):
        run_export(plan_export(folder.parent / "native"), folder.parent / "back", check=False)
    assert not (folder.parent / "back").exists()
    file.write_bytes(b"\xff" * len(content))
    with TensorReader(folder.parent / "native") as reader, pytest.raises(ValueError, match="is damaged"):
        reader.read("master.decoder.final_layernorm.weight", (0,), (48,))
