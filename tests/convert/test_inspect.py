"""Check what `inspect` prints for every kind of checkpoint, whole and damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from bd3_scale.convert.inspect import inspect
from tests.convert.models import BYTES, LLAMA_SHAPE, native_checkpoint, save_folder, sdar_folder, transformers_model


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native_checkpoint(tmp_path_factory.mktemp("native") / "checkpoints", LLAMA_SHAPE, BYTES)


def test_a_native_checkpoint(native: Path) -> None:
    found = inspect(native, verify=True)
    assert found.sound
    assert found.health == "all 4 files have the right hash"
    # Two layers: norms 2·48, qkv 96·48, proj 48·48, gate/up 128·48, down 48·64; embedding and head 384·48, norm 48.
    assert found.parameters == 2 * (96 + 96 * 48 + 48 * 48 + 128 * 48 + 48 * 64) + 2 * 384 * 48 + 48
    assert found.bytes == 4 * 4 * found.parameters, "masters, two moments and the moving average, fp32"
    assert found.details["states"] == "master, exp_avg, exp_avg_sq, ema"
    assert found.details["written by"] == ("1 rank (tensor 1, pipeline 1, context 1, ZeRO 1); any number can read it")
    assert str(found.details["software"]).startswith("bd3_scale 0.")
    assert "num_layers: 2" in str(found.details["recipe"])
    assert str(found.details["tokeniser"]).startswith("258 ids with the mask")
    assert found.exports["bd3"] is None
    assert "no q/k norm" in str(found.exports["sdar"])
    qkv = next(t for t in found.tensors if t.name == "ema.decoder.layers.self_attention.linear_qkv.weight")
    assert (qkv.dtype, qkv.shape) == ("float32", (2, 96, 48))


def test_a_flipped_byte_is_found_by_hash_alone(native: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(native, tmp_path / "damaged")
    file = damaged / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert inspect(damaged).sound
    found = inspect(damaged, verify=True)
    assert not found.sound
    assert found.health == "damaged: rank-00000.safetensors"
    file.unlink()
    with pytest.raises(ValueError, match=r"rank-00000\.safetensors is missing"):
        inspect(damaged)


def test_folders_of_other_software(tmp_path: Path) -> None:
    found = inspect(sdar_folder(tmp_path / "sdar"))
    assert found.kind == "SDARForCausalLM"
    assert found.exports["sdar"] is None
    assert found.details["block size"] == 4
    model = transformers_model("Llama", vocab_size=257)
    found = inspect(save_folder(tmp_path / "llama", model, tokenizer=None))
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.exports["llama"] is None
    assert found.details["tokeniser"] == "none"
    other = transformers_model("GPT2", vocab_size=40, n_embd=16, n_head=2, n_layer=1)
    found = inspect(save_folder(tmp_path / "gpt2", other, tokenizer=None))
    assert found.kind.startswith("GPT2LMHeadModel, which cannot be imported; SDARForCausalLM")
    assert found.exports == {}


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        inspect(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is neither a checkpoint nor a run directory"):
        inspect(tmp_path / "empty")
    torch.save({"x": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt"):
        inspect(tmp_path / "other.pt")
