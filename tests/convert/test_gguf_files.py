"""Check GGUF files of models larger than memory, and the message for a file where a checkpoint is expected."""

from __future__ import annotations

import ctypes
import gc
import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import bd3_scale
from bd3_scale.cli import app
from bd3_scale.convert import gguf_export
from bd3_scale.convert.gguf import plan_gguf, write_gguf
from bd3_scale.convert.gguf_export import GgufOptions, run_gguf_export
from bd3_scale.convert.inspect import inspect
from bd3_scale.recipe.schema import ModelRecipe
from tests.convert.models import BYTES, QWEN_SHAPE, native_checkpoint

NOTHING = GgufOptions(None, 0, 0, 1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native_checkpoint(tmp_path_factory.mktemp("gguf") / "native", QWEN_SHAPE, BYTES)


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_what_is_made_of_checkpoints_alone_says_so_of_a_file(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.bd3.gguf"
    write_gguf(plan_gguf(checkpoint, "q8_0", importance=False), path)
    found = inspect(path)
    assert found.kind == "file for llama.cpp, architecture qwen3, type q8_0"
    sizes = {tensor.name: (tensor.dtype, tensor.shape) for tensor in found.tensors}
    assert sizes["token_embd.weight"] == ("F16", (258, 48)), "rows of 48 are no whole blocks"
    assert sizes["blk.1.ffn_down.weight"] == ("Q8_0", (48, 64))
    assert found.parameters == sum(np.prod(shape) for _, shape in sizes.values())
    assert found.details["diffusion.block_length"] == found.details["block size"] == 4
    assert found.details["tokenizer.ggml.tokens"] == "258 values"
    assert str(found.details["bd3_scale.manifest"]).endswith(" characters")
    assert json.loads(run("convert", "inspect", path, "--json").output)["kind"] == found.kind
    for arguments in (("harness", path, "--tasks", "x"), ("convert", "export", path, "--out", tmp_path / "out")):
        assert "is a file for llama.cpp; only `generate`, `evaluate`" in str(run(*arguments).exception)
    with pytest.raises(ValueError, match="Give the checkpoint that it was made from"):
        bd3_scale.load(path)
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: its header has changed since it was written"):
        inspect(path)


def test_a_model_without_memory_for_it_is_written_and_said_to_be_unchecked(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_gguf(checkpoint, "f32", importance=False)
    assert run_gguf_export(plan, tmp_path / "checked", NOTHING).unchecked is None
    monkeypatch.setattr(gguf_export, "available_bytes", lambda: 2 * plan.whole_bytes - 1)
    report = run_gguf_export(plan, tmp_path / "out", NOTHING)
    assert report.unchecked is not None
    assert "llama.cpp's logits were not compared" in report.unchecked
    assert json.loads((tmp_path / "out" / "gguf_report.json").read_text())["unchecked"] == report.unchecked
    assert report.checked_texts == 3000
    assert (tmp_path / "out" / plan.name).read_bytes() == (tmp_path / "checked" / plan.name).read_bytes()
    monkeypatch.setattr(gguf_export, "available_bytes", lambda: 2 * plan.whole_bytes)
    assert run_gguf_export(plan, tmp_path / "again", NOTHING).unchecked is None


@pytest.mark.slow
@pytest.mark.alone
def test_a_model_without_memory_for_it_is_converted_a_tensor_at_a_time(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check the peak memory for a model of 110 MB in fp32 whose largest tensor has 6 MB."""
    run_gguf_export(plan_gguf(checkpoint, "f32", importance=False), tmp_path / "warm", NOTHING)
    shape = ModelRecipe(num_layers=8, hidden_size=512, num_attention_heads=8, ffn_hidden_size=1536)
    plan = plan_gguf(native_checkpoint(tmp_path / "large" / "native", shape, BYTES), "f32", importance=False)
    assert plan.whole_bytes > 110e6
    whole = own_memory(lambda: run_gguf_export(plan, tmp_path / "whole", NOTHING))
    monkeypatch.setattr(gguf_export, "available_bytes", lambda: 0)
    assert own_memory(lambda: run_gguf_export(plan, tmp_path / "out", NOTHING)) < 50e6 < 110e6 < whole


def own_memory(function: Callable[[], object]) -> int:
    """Return by how many bytes this process's memory grows at most meanwhile, without mapped files."""

    def now() -> int:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields["RssAnon"].split()[0]) * 1024

    def watch() -> None:
        while not done.wait(0.003):
            seen.append(now())

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory would be reused and not counted
    done, seen = threading.Event(), [now()]
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        function()
    finally:
        done.set()
        thread.join()
    return max(seen) - seen[0]
