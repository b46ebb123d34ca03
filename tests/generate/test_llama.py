"""Compare decoding and measuring through llama.cpp with the checkpoint: the same tokens, stops and bounds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bd3_scale import load, processor
from bd3_scale.checkpoint.model import open_model
from bd3_scale.cli import app
from bd3_scale.convert.gguf import plan_gguf, write_gguf
from bd3_scale.evaluate.checkpoint import evaluate_checkpoint
from bd3_scale.evaluate.sets import NamedText
from bd3_scale.generate import llama_cpp, llama_model
from bd3_scale.generate.config import SamplingConfig
from bd3_scale.generate.llama_file import open_llama_file
from bd3_scale.generate.source import open_source, open_writer
from tests.convert.models import BYTES, QWEN_SHAPE, native_checkpoint
from tests.generate.sampling import generate_batch

RULES = (
    {"temperature": 0},
    {"temperature": 0, "unmasking": "static", "steps": 2},
    {"unmasking": "first-hitting", "seed": 5},
    {"unmasking": "ancestral", "steps": 3, "top_k": 20},
    {"unmasking": "static", "temperature": 0.7},
    {"unmasking": "dynamic", "threshold": 0.2, "top_p": 0.9},
    {"unmasking": "entropy", "threshold": 2.0},
)
# Prompts: shorter than a block, with more blocks than one pass takes, with a partial and a whole last block, with gaps.
PROMPTS = [[7], [1, 2, 3, 4, 5], list(range(41)), list(range(80)), [9, 257, 10, 11, 12, 257, 257, 3]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native_checkpoint(tmp_path_factory.mktemp("llama") / "native", QWEN_SHAPE, BYTES)


@pytest.fixture(scope="module")
def file(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "native-f32.bd3.gguf"
    write_gguf(plan_gguf(checkpoint, "f32", importance=False), path)
    return path


@pytest.fixture(scope="module")
def both(checkpoint: Path, file: Path):
    with open_model(checkpoint) as (native, _, _), open_llama_file(file) as opened:
        model = opened.load()
        yield native, model
        model.close()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_same_tokens_in_the_same_passes(rule: dict, both) -> None:
    how = {"block_size": 4, "max_new_tokens": 22, "min_entropy": 0.0, **rule}
    expected, found = (generate_batch(model, PROMPTS, **how) for model in both)
    assert found == expected


@pytest.mark.parametrize("window", [8, 16])
def test_a_window_forgets_the_same(window: int, both) -> None:
    how = {"block_size": 4, "max_new_tokens": 40, "min_entropy": 0.0, "window": window}
    expected, found = (generate_batch(model, PROMPTS[:4], **how) for model in both)
    assert found == expected
    assert found != generate_batch(both[1], PROMPTS[:4], **{**how, "window": None})


def test_texts_and_stop_strings_are_the_checkpoint_s(checkpoint: Path, file: Path) -> None:
    sampling = SamplingConfig(max_new_tokens=60, seed=2, min_entropy=0.0)
    written = []
    for path in (checkpoint, file):
        with open_writer(path) as writer:
            plain = list(writer.write(["ab", "The"], sampling))
            stop = plain[0].text[10:12]
            stopped = list(writer.write(["ab", "The"], sampling, stop=[stop]))
            written.append([dataclasses.replace(one, seconds=0.0) for one in (*plain, *stopped)])
    assert written[0] == written[1]
    assert written[0][2].stopped_by == "stop string"


def test_bfloat16_is_warned_of_where_the_cpu_emulates_it(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    warnings = []
    for multiplies in (True, False):
        monkeypatch.setattr(processor, "multiplies_bf16", lambda answer=multiplies: answer)
        with open_source(checkpoint, torch.bfloat16):
            warnings.append(capsys.readouterr().err)
    assert warnings[0] == ""
    assert "this CPU does not multiply bfloat16 natively: float32 is several times as fast" in warnings[1]


def test_a_checkpoint_s_weights_are_rounded_if_asked_and_a_file_s_are_its_own(checkpoint: Path, file: Path) -> None:
    command = ["--prompt", "ab", "--dtype", "bfloat16", "--temperature", "0", "--min-entropy", "0", "--json"]
    ran = CliRunner().invoke(app, ["generate", str(checkpoint), *command, "--max-new-tokens", "20"])
    assert ran.exit_code == 0, ran.output
    model = load(checkpoint, dtype=torch.bfloat16)
    assert (
        json.loads(ran.stdout)["text"] == model.generate("ab", temperature=0.0, min_entropy=0.0, max_new_tokens=20).text
    )
    with open_writer(checkpoint, torch.bfloat16) as rounded:
        assert {weight.dtype for weight in rounded.model.parameters()} == {torch.bfloat16}
    with (
        pytest.raises(ValueError, match="have fixed types: leave out --dtype"),
        open_writer(file, torch.bfloat16),
    ):
        pass


def test_a_file_says_what_its_checkpoint_says(checkpoint: Path, file: Path) -> None:
    with open_source(checkpoint) as mine, open_source(file) as theirs:
        assert mine.manifest == theirs.manifest
        assert mine.stop_ids == theirs.stop_ids
        assert mine.least_entropy() == theirs.least_entropy()
        assert mine.tokenizer().hash == theirs.tokenizer().hash


@pytest.mark.parametrize("block_size", [1, 4, 8, 128])
def test_the_bound_is_the_checkpoint_s(block_size: int, checkpoint: Path, file: Path, tmp_path: Path) -> None:
    """Check one long document and short ones that share a sequence; at the last size no block sees another."""
    documents = [{"text": "A long one. " * 30}, *({"text": f"Document {number} is short."} for number in range(9))]
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(map(json.dumps, documents)))
    how = {"texts": [NamedText.parse(str(text))], "draws": 2, "block_sizes": [block_size]}
    (mine,), (theirs,) = (evaluate_checkpoint(path, **how) for path in (checkpoint, file))
    assert mine.sequences > 1
    assert theirs.nelbo == pytest.approx(mine.nelbo, rel=1e-6)
    assert theirs.padded_nelbo == (mine.padded_nelbo and pytest.approx(mine.padded_nelbo, rel=1e-6))
    assert theirs.text_standard_error == pytest.approx(mine.text_standard_error, rel=1e-4)
    assert theirs.tokens == mine.tokens


def test_a_build_that_masks_otherwise_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = llama_cpp.Context.decode

    def seen_by_all(self, tokens, positions, sequences, wanted):
        """Decode as if the last sequence, which has all blocks, decided for each row."""
        widest = max(max(of) for of in sequences)
        return decode(self, tokens, positions, [[widest] if len(of) > 1 else of for of in sequences], wanted)

    monkeypatch.setattr(llama_cpp.Context, "decode", seen_by_all)
    with open_llama_file(file) as opened, pytest.raises(ValueError, match="handles sequences in an unknown way"):
        opened.load()


def test_a_causal_build_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = llama_cpp.Context.__init__

    def causal(self, model, **how):
        made(self, model, **how)
        model.library.llama_set_causal_attn(self._pointer, True)

    monkeypatch.setattr(llama_cpp.Context, "__init__", causal)
    with open_llama_file(file) as opened, pytest.raises(ValueError, match="handles sequences in an unknown way"):
        opened.load()


def test_either_order_of_sequences_is_found_out(file: Path, both, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a library that takes a row's sequences in reverse order: the texts stay the same."""
    decode = llama_cpp.Context.decode
    how = {"block_size": 4, "max_new_tokens": 9, "min_entropy": 0.0}
    expected = generate_batch(both[1], PROMPTS, **how)

    def mirrored(self, tokens, positions, sequences, wanted):
        return decode(self, tokens, positions, [list(reversed(of)) for of in sequences], wanted)

    monkeypatch.setattr(llama_cpp.Context, "decode", mirrored)
    with open_llama_file(file) as opened:
        model = opened.load()
        assert generate_batch(model, PROMPTS, **how) == expected
        model.close()


def test_a_library_with_other_structures_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    llama_cpp.library.cache_clear()
    try:
        monkeypatch.setattr(llama_cpp, "RELEASE", "2026.1.1")
        with pytest.raises(ValueError, match=r"xllamacpp 2026\.10\.11549 is installed, and its structures may differ"):
            llama_cpp.library()
        monkeypatch.undo()
        monkeypatch.setitem(llama_cpp.DEFAULTS[llama_cpp.ContextParams], "kv_unified", True)
        with pytest.raises(ValueError, match=r"other defaults than that release .*'kv_unified': False"):
            llama_cpp.library()
    finally:
        monkeypatch.undo()
        llama_cpp.library.cache_clear()


def test_a_full_cache_and_a_broken_file_say_so(both, file: Path, tmp_path: Path) -> None:
    cache = both[1].new_cache(1, 4)
    block, nothing = np.zeros((1, 4), dtype=np.int64), np.zeros((1, 4), dtype=np.bool_)

    def fill() -> None:
        for start in range(0, 4096, 4):
            cache.write(block, [start], nothing)
            cache.commit([4])

    with pytest.raises(ValueError, match=r"llama\.cpp refuses a pass of 4 rows"):
        fill()
    damaged = bytearray(file.read_bytes())
    damaged[damaged.index(b"diffusion.block_length")] ^= 1
    for content, words in (
        (damaged, "is damaged: its header has changed since it was written"),
        (damaged[:-100], "or is incomplete"),
        (b"", "or is incomplete"),
        (b"GGUF" + bytes(60), "or is incomplete"),
    ):
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(ValueError, match=words), open_llama_file(tmp_path / "x.gguf"):
            pass
    assert llama_model.CHUNK_ROWS >= 4 * llama_model.CHUNK
