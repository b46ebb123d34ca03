"""Check the packed format: unpacked by plain arithmetic, by the library, and by transformers on a whole model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import bd3_scale
from bd3_scale.convert import quantizer
from bd3_scale.convert.compressed import engine_notes, packed_tensors, quantization_config, unpacked_weight
from bd3_scale.convert.importer import plan_import
from bd3_scale.convert.quantizer import Scheme, round_to_nearest
from bd3_scale.observe import libraries
from bd3_scale.observe.libraries import without_broken_torchvision
from tests.convert.models import save_folder, sdar_folder, tensors, transformers_model

with without_broken_torchvision():
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams


def library_scheme(scheme: Scheme) -> QuantizationScheme:
    return QuantizationScheme(**quantization_config(scheme, [])["config_groups"]["group_0"])


@pytest.mark.parametrize("bits", [4, 8])
def test_words_hold_the_values_from_the_lowest_bits_up(bits: int) -> None:
    scheme = Scheme(bits, 32)
    quantised = round_to_nearest(torch.randn(5, 96), scheme, torch.bfloat16)
    packed = packed_tensors("x", quantised, scheme)
    assert packed.keys() == {"x.weight_packed", "x.weight_scale", "x.weight_shape"}
    assert packed["x.weight_shape"].tolist() == [5, 96]
    words = packed["x.weight_packed"].numpy().view(np.uint32)
    each = 32 // bits
    assert words.shape == (5, 96 // each)
    values = [
        [(int(w) >> bits * i & (1 << bits) - 1) - (1 << bits - 1) for w in row for i in range(each)] for row in words
    ]
    assert np.array_equal(np.array(values), quantised.values.numpy())
    assert torch.equal(unpacked_weight(packed, "x", scheme), quantised.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_library_decompresses_to_the_same_bits(bits: int, dtype: torch.dtype) -> None:
    scheme = Scheme(bits, 32)
    quantised = round_to_nearest(torch.randn(6, 96), scheme, dtype)
    packed = {name.removeprefix("x."): tensor for name, tensor in packed_tensors("x", quantised, scheme).items()}
    found = PackedQuantizationCompressor.decompress(packed, library_scheme(scheme))["weight"]
    assert found.dtype == dtype
    assert torch.equal(found, quantised.dequantize())


@pytest.mark.parametrize("bits", [4, 8])
def test_unclipped_levels_are_those_of_the_library(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizer, "CLIPPING", (1.0,))
    scheme, weight = Scheme(bits, 32), torch.randn(6, 96)
    found = round_to_nearest(weight, scheme, torch.float32)
    grouped = weight.unflatten(1, (-1, 32))
    arguments = library_scheme(scheme).weights
    scales, _ = calculate_qparams(grouped.amin(-1), grouped.amax(-1), arguments)
    assert torch.equal(found.scales, scales)
    assert torch.equal(found.values, quantize(weight, scales, None, arguments, dtype=torch.int8))


def test_rows_that_do_not_fill_words_are_refused() -> None:
    scheme = Scheme(4, 3)
    with pytest.raises(ValueError, match="x has 12 input features, which do not fill whole words of 8"):
        packed_tensors("x", round_to_nearest(torch.randn(2, 12), scheme, torch.bfloat16), scheme)


def test_layers_that_marlin_does_not_run_are_named() -> None:
    assert engine_notes((192, 4096), Scheme(4)) == []
    assert engine_notes((96, 192), Scheme(8, 16)) == [
        "groups of 16: Marlin runs those of 32, 64, 128",
        "96 output features on a rank: Marlin runs multiples of 64",
        "192 input features on a rank: Marlin runs multiples of 128",
    ]


def test_torchvision_is_hidden_inside_alone_and_inside_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(libraries.importlib, "import_module", fail)
    with without_broken_torchvision():
        with without_broken_torchvision():
            assert sys.modules["torchvision"] is None
        assert sys.modules["torchvision"] is None
    assert "torchvision" not in sys.modules


def test_a_packed_folder_is_run_as_what_it_stands_for_and_imported_no_more(tmp_path: Path) -> None:
    """Check that `load` unpacks the folder, that an import of it is refused, and that other packings are refused."""
    folder = sdar_folder(tmp_path / "packed")
    scheme, written, plain = Scheme(4, 16), {}, {}
    for name, tensor in tensors(folder).items():
        if name.endswith("_proj.weight"):
            quantised = round_to_nearest(tensor, scheme, tensor.dtype)
            written |= packed_tensors(name.removesuffix(".weight"), quantised, scheme)
            plain[name] = quantised.dequantize()
        else:
            written[name] = plain[name] = tensor
    shutil.copytree(folder, tmp_path / "plain")
    for where, found in ((folder, written), (tmp_path / "plain", plain)):
        for shard in where.glob("*.safetensors*"):
            shard.unlink()
        save_file(found, where / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    described["quantization_config"] = quantization_config(scheme, ["lm_head"])
    (folder / "config.json").write_text(json.dumps(described))
    ids = torch.randint(0, 250, (2, 8))
    assert torch.equal(bd3_scale.load(folder).logits(ids), bd3_scale.load(tmp_path / "plain").logits(ids))
    with pytest.raises(ValueError, match="the checkpoint is quantised"):
        plan_import(folder)
    described["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = False
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="quantised in an unsupported way"):
        bd3_scale.load(folder)


@pytest.mark.launch
@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_transformers_computes_with_the_dequantised_weights(bits: int, tmp_path: Path) -> None:
    """Check the weights through transformers' integration of compressed-tensors, in a new process."""
    scheme = Scheme(bits, 16)
    model = transformers_model("Qwen3", vocab_size=257, dtype=torch.float32)
    save_folder(tmp_path / "packed", model, tokenizer=None)
    all_tensors = tensors(tmp_path / "packed")
    written, plain = {}, dict(all_tensors)
    for name, tensor in all_tensors.items():
        if name.endswith("_proj.weight"):
            quantised = round_to_nearest(tensor, scheme, torch.float32)
            written |= packed_tensors(name.removesuffix(".weight"), quantised, scheme)
            plain[name] = quantised.dequantize()
        else:
            written[name] = tensor
    save_file(written, tmp_path / "packed" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    config["quantization_config"] = quantization_config(scheme, ["lm_head"])
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    ids = torch.randint(0, 257, (2, 20))
    model.load_state_dict(plain)
    with torch.no_grad():
        torch.save({"ids": ids, "logits": model(ids).logits}, tmp_path / "expected.pt")
    program = Path(__file__).parent / "load_packed.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", program, tmp_path / "packed", tmp_path / "expected.pt"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "equal" in done.stdout


def test_the_configuration_says_what_engines_ask() -> None:
    config = quantization_config(Scheme(4), ["lm_head"])
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == "pack-quantized"
    assert config["quantization_status"] == "compressed"
    assert config["ignore"] == ["lm_head"]
    (group,) = config["config_groups"].values()
    assert group["targets"] == ["Linear"]
    expected = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    assert expected.items() <= group["weights"].items()
    json.dumps(config)
