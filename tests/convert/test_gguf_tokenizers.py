"""Check that llama.cpp gives training's ids for a text, or that the tokeniser is refused."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import Regex, pre_tokenizers
from typer.testing import CliRunner

from bd3_scale.cli import app
from bd3_scale.convert import gguf_tokenizer_forms
from bd3_scale.convert.gguf import GgufPlan, check_tokenizer_ids, plan_gguf, write_gguf
from bd3_scale.convert.gguf_tokenizer import TokenizerKeys, sample_texts, tokenizer_keys
from bd3_scale.data.tokenizer import Tokenizer, load_tokenizer
from bd3_scale.data.tokenizer_folder import write_tokenizer
from tests.convert.models import BYTES, QWEN_SHAPE, native_checkpoint
from tests.data.tokenisers import KINDS, SENTENCES, byte_level, unigram, write_backend
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
    """Return Unigram of the form that llama.cpp has, with `change` applied to its tokenizer.json."""
    content = json.loads(unigram().to_str())
    content["normalizer"] = None
    content["pre_tokenizer"]["prepend_scheme"] = content["decoder"]["prepend_scheme"] = "never"
    vocab = content["model"]["vocab"]
    vocab += [["--", -9.1], ["---", -7.3], ["----", -8.9], ["▁▁", -6.2]]
    # Scores have few digits, so that float32 holds them and sums are exact.
    content["model"]["vocab"] = [[piece, round(score * 1024) / 1024] for piece, score in vocab]
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
    # Only the vocabulary is read: the tensors may belong to another model.
    plan = plan_gguf(checkpoint, "f32", importance=False)
    plan = GgufPlan(plan.export, plan.kind, plan.architecture, plan.tensors, plan.types, tokenizer, keys)
    write_gguf(plan, tmp_path / "m.bd3.gguf")
    repetitions = [40 if len(token) == 1 else 4 for token in keys.tokens] if name in UNIGRAM else []
    assert check_tokenizer_ids(plan, tmp_path / "m.bd3.gguf") == 3000 + sum(repetitions)
    flags = keys.flags
    assert flags["tokenizer.ggml.add_bos_token"] == (name in ("begins", "llama-2"))
    # Wrong names of the expression, or wrong scores, must be detected.
    if keys.merges is not None:
        wrong = {**keys.strings, "tokenizer.ggml.pre": "llama-bpe" if name != "qwen2" else "gpt-2"}
        bad = type(keys)(**{**vars(keys), "strings": wrong})
    else:
        bad = type(keys)(**{**vars(keys), "scores": [-score for score in keys.scores]})
    plan = GgufPlan(plan.export, plan.kind, plan.architecture, plan.tensors, plan.types, tokenizer, bad)
    write_gguf(plan, tmp_path / "bad.bd3.gguf")
    with pytest.raises(ValueError, match=r"llama\.cpp has no tokeniser like this model's: it tokenises "):
        check_tokenizer_ids(plan, tmp_path / "bad.bd3.gguf")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("prefixed", "puts a space before every text"),
        ("metaspace-always", "no byte-level BPE"),
        ("unigram", "Unigram changes texts by NFKC"),
        ("word-pieces", "it is a WordPiece tokeniser"),
    ],
)
def test_other_tokenisers_are_refused(name: str, reason: str, tmp_path: Path) -> None:
    source = write_kind(tmp_path / "source", KINDS[name])
    with pytest.raises(ValueError, match=reason):
        keys_of(load_tokenizer(source), source, tmp_path / "folder")


def with_bytes(content: dict[str, Any]) -> None:
    unknown, *rest = content["model"]["vocab"]
    content["model"] |= {
        "byte_fallback": True,
        "vocab": [unknown, *([f"<0x{byte:02X}>", -20.0] for byte in range(256)), *rest],
    }
    for entry in content["added_tokens"][1:]:
        entry["id"] += 256


def prefixed_unigram(content: dict[str, Any]) -> None:
    content["pre_tokenizer"]["prepend_scheme"] = "always"


def words_alone(content: dict[str, Any]) -> None:
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}]}


def pieces_special(content: dict[str, Any]) -> None:
    """Check `[CLS]` among the pieces: text that spells it becomes that token here."""
    content["model"]["vocab"].append(["[CLS]", 0.0])
    last = len(content["model"]["vocab"]) - 1
    for place, entry in enumerate(content["added_tokens"][1:]):
        entry["id"] = last + 1 + place
    content["added_tokens"].insert(1, {**content["added_tokens"][0], "id": last, "content": "[CLS]"})


def long_scores(content: dict[str, Any]) -> None:
    for entry in content["model"]["vocab"]:
        entry[1] *= 1.1


def plain_added(content: dict[str, Any]) -> None:
    content["added_tokens"][1]["special"] = False


def twice(content: dict[str, Any]) -> None:
    content["model"]["vocab"][-1][0] = content["model"]["vocab"][-2][0]


def with_charsmap(content: dict[str, Any]) -> None:
    from sentencepiece import SentencePieceTrainer, sentencepiece_model_pb2

    written = io.BytesIO()
    SentencePieceTrainer.train(sentence_iterator=iter(SENTENCES), model_writer=written, vocab_size=60, minloglevel=2)
    charsmap = sentencepiece_model_pb2.ModelProto.FromString(written.getvalue()).normalizer_spec.precompiled_charsmap
    spaces = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}
    steps = [{"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}, spaces]
    content["normalizer"] = {"type": "Sequence", "normalizers": steps}


def llama_cpp_differs(tokenizer: Tokenizer, keys: TokenizerKeys, checkpoint: Path, path: Path) -> None:
    plan = plan_gguf(checkpoint, "f32", importance=False)
    plan = GgufPlan(plan.export, plan.kind, plan.architecture, plan.tensors, plan.types, tokenizer, keys)
    write_gguf(plan, path)
    with pytest.raises(ValueError, match=r"llama\.cpp has no tokeniser like this model's: it tokenises "):
        check_tokenizer_ids(plan, path)


@pytest.mark.parametrize("change", [with_bytes, prefixed_unigram, words_alone, pieces_special, long_scores])
def test_unigram_that_llama_cpp_encodes_otherwise_is_refused(
    change: Callable[[dict[str, Any]], None], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_backend(tmp_path / "source", changed_unigram(change), {"eos_token": "</s>"})
    tokenizer = load_tokenizer(source)
    if change in (with_bytes, prefixed_unigram, words_alone):
        with pytest.raises(ValueError, match=r"its Unigram (falls back to bytes|splits texts)"):
            keys_of(tokenizer, source, tmp_path / "refused")
    # Tokenisers that the check of the form refuses also give other ids in llama.cpp.
    monkeypatch.setattr(gguf_tokenizer_forms, "_check_unigram", lambda content: None)
    llama_cpp_differs(tokenizer, keys_of(tokenizer, source, tmp_path / "folder"), checkpoint, tmp_path / "m.bd3.gguf")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_charsmap, "changes texts by Precompiled, Replace before"),
        (plain_added, "added tokens that are not special"),
        (twice, "a piece twice"),
    ],
)
def test_unigram_of_other_forms_is_refused(
    change: Callable[[dict[str, Any]], None], reason: str, tmp_path: Path
) -> None:
    source = write_backend(tmp_path / "source", changed_unigram(change), {"eos_token": "</s>"})
    with pytest.raises(ValueError, match=reason):
        keys_of(load_tokenizer(source), source, tmp_path / "folder")


@pytest.mark.slow
def test_a_model_of_unigram_pieces_generates_the_same(tmp_path: Path) -> None:
    source = write_backend(tmp_path / "source", changed_unigram(), {"eos_token": "</s>"})
    vocabulary = load_tokenizer(source).vocabulary
    checkpoint = native_checkpoint(tmp_path / "run" / "native", QWEN_SHAPE, vocabulary, tokenizer=source)

    def told(*arguments: object) -> Any:
        found = CliRunner().invoke(app, [*map(str, arguments), "--json"])
        assert found.exception is None, found.output
        return json.loads(found.output)

    file = tmp_path / "out" / "native-f32.bd3.gguf"
    told("convert", "export", checkpoint, "--format", "gguf", "--type", "f32", "--out", file.parent, "--sequences", 0)
    sampling = ("--prompt", "The barge ½ <unk>", "--max-new-tokens", 12, "--min-entropy", 0)
    mine, theirs = (told("generate", path, *sampling) for path in (checkpoint, file))
    assert mine["text"] == theirs["text"] != ""
    assert '"t5"' in json.dumps(told("convert", "inspect", file))


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
