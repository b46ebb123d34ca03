"""Tokenisers of GGUF files: llama.cpp makes training's ids of text, or the tokeniser is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from typer.testing import CliRunner

from bd3_scale.cli import app
from bd3_scale.convert import gguf_tokenizer_forms
from bd3_scale.convert.gguf import GgufPlan, check_tokenizer_ids, plan_gguf, write_gguf
from bd3_scale.convert.gguf_tokenizer import sample_texts, tokenizer_keys
from bd3_scale.data.tokenizer import Tokenizer, load_tokenizer
from bd3_scale.data.tokenizer_folder import write_tokenizer
from tests.convert.models import BYTES, QWEN_SHAPE, native_checkpoint
from tests.data.tokenisers import KINDS, byte_level, unigram, write_backend
from tests.data.tokenisers import write_tokenizer as write_kind

QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native_checkpoint(tmp_path_factory.mktemp("gguf") / "native", QWEN_SHAPE, BYTES)


def keys_of(tokenizer: Tokenizer, source: Path, folder: Path):
    folder.mkdir()
    write_tokenizer(tokenizer, source, folder)
    return tokenizer_keys(tokenizer, folder, tokenizer.vocabulary.size + 3)


def qwen_like():
    backend = byte_level(400)
    split = pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return backend


def changed_unigram(change: Callable[[dict[str, Any]], object] = lambda content: None) -> tokenizers.Tokenizer:
    """Return Unigram of the form that llama.cpp has, and then `change` made to its tokenizer.json."""
    content = json.loads(unigram().to_str())
    content["normalizer"] = None
    content["pre_tokenizer"]["prepend_scheme"] = content["decoder"]["prepend_scheme"] = "never"
    vocab = content["model"]["vocab"]
    vocab += [["--", -9.1], ["---", -7.3], ["----", -8.9], ["▁▁", -6.2]]
    content["model"]["vocab"] = [[piece, float(np.float32(score))] for piece, score in vocab]
    for place, entry in enumerate(content["added_tokens"][1:]):
        entry["id"] = len(vocab) + place
    change(content)
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def not_split(content: dict[str, Any]) -> None:
    content["pre_tokenizer"]["split"] = False


UNIGRAM = {"unigram": changed_unigram, "unigram, not split": lambda: changed_unigram(not_split)}


@pytest.mark.parametrize("name", ["byte-level", "chat", "begins", "own mask", "llama-2", "qwen2", *UNIGRAM])
def test_llama_cpp_makes_the_same_ids(
    name: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "qwen2":
        source = write_backend(tmp_path / "source", qwen_like(), {"eos_token": "<|endoftext|>"})
    elif name in UNIGRAM:
        source = write_backend(tmp_path / "source", UNIGRAM[name](), {"eos_token": "</s>"})
    else:
        source = write_kind(tmp_path / "source", KINDS[name])
    tokenizer = load_tokenizer(source)
    keys = keys_of(tokenizer, source, tmp_path / "folder")
    # The vocabulary alone is asked: the tensors may be of another model.
    plan = plan_gguf(checkpoint, "f32", importance=False)
    plan = GgufPlan(plan.export, plan.kind, plan.architecture, plan.tensors, plan.types, tokenizer, keys)
    write_gguf(plan, tmp_path / "m.bd3.gguf")
    texts = 3000 + (len(keys.tokens) if name in UNIGRAM else 0)
    assert check_tokenizer_ids(plan, tmp_path / "m.bd3.gguf") == texts
    flags = keys.flags
    assert flags["tokenizer.ggml.add_bos_token"] == (name in ("begins", "llama-2"))
    # A wrong name of the expression, or other scores, are found out.
    if keys.merges is not None:
        wrong = {**keys.strings, "tokenizer.ggml.pre": "llama-bpe" if name != "qwen2" else "gpt-2"}
        bad = type(keys)(**{**vars(keys), "strings": wrong})
    else:
        bad = type(keys)(**{**vars(keys), "scores": [-score for score in keys.scores]})
    plan = GgufPlan(plan.export, plan.kind, plan.architecture, plan.tensors, plan.types, tokenizer, bad)
    write_gguf(plan, tmp_path / "bad.bd3.gguf")
    with pytest.raises(ValueError, match=r"llama\.cpp has no tokeniser like this model's: of "):
        check_tokenizer_ids(plan, tmp_path / "bad.bd3.gguf")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("prefixed", "puts a space before every text"),
        ("metaspace-always", "no byte-level BPE"),
        ("unigram", "Unigram changes texts by NFKC"),
        ("word-pieces", "of the kind WordPiece"),
    ],
)
def test_other_tokenisers_are_refused(name: str, reason: str, tmp_path: Path) -> None:
    source = write_kind(tmp_path / "source", KINDS[name])
    with pytest.raises(ValueError, match=reason):
        keys_of(load_tokenizer(source), source, tmp_path / "folder")


def test_a_chat_template_goes_with_the_model(tmp_path: Path) -> None:
    source = write_kind(tmp_path / "source", KINDS["chat"])
    (source / "chat_template.jinja").write_text("{{ messages }}")
    keys = keys_of(load_tokenizer(source), source, tmp_path / "folder")
    assert keys.strings["tokenizer.chat_template"] == "{{ messages }}"
    (source / "chat_template.jinja").unlink()
    said = json.loads((source / "tokenizer_config.json").read_text())
    for name, template in {"declared": "{{ declared }}", "none": None}.items():
        (source / "tokenizer_config.json").write_text(json.dumps(said | {"chat_template": template}))
        found = keys_of(load_tokenizer(source), source, tmp_path / name)
        assert found.strings.get("tokenizer.chat_template") == template
    assert sum(token in ("<|im_start|>", "<think>") and kind == 3
               for token, kind in zip(keys.tokens, keys.types, strict=True)) == 2  # fmt: skip


def test_texts_are_of_many_kinds_and_always_the_same() -> None:
    texts = list(sample_texts(500))
    assert texts == list(sample_texts(500))
    everything = "".join(texts)
    assert all(
        re.search(pattern, everything)
        for pattern in ("[А-я]", "[一-龥]", "\r\n", "'LL", "  ", "[\U0001f300-\U0001f600]")
    )
