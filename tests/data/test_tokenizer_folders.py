"""Test folders of tokenisers: their BOS settings, and folders with a SentencePiece model alone."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bd3_scale.data import tokenizer as tokenizer_module
from bd3_scale.data.tokenizer import load_tokenizer
from tests.data.tokenisers import (
    EXAMPLES,
    KINDS,
    SENTENCES,
    WORDS,
    Made,
    begins,
    byte_level,
    pieces_with_bytes,
    transformers_tokenizer,
    write_backend,
    write_tokenizer,
)

# --- what texts begin with


@pytest.mark.parametrize(
    ("name", "bos"),
    [("bytes", None), ("byte-level", None), ("begins", "<|begin|>"), ("llama-3", "<|begin|>"), ("llama-2", "<s>")],
)
def test_texts_begin_with_what_the_template_says(
    name: str, bos: str | None, made: Callable[[str], Made], tmp_path: Path
) -> None:
    one = made(name)
    found = one.ours.vocabulary.bos_id
    assert found == one.ours.declared_bos_id == (None if bos is None else one.theirs.convert_tokens_to_ids(bos))
    assert one.ours.checked_template() is one.ours.with_bos(found) is one.ours
    assert one.ours.with_bos_switch(found is not None) is one.ours

    for token_id in (None, one.ours.vocabulary.eos_id, found):  # GPT-2 begins texts with what ends them
        other = one.ours.with_bos(token_id)
        folder = tmp_path / str(token_id)
        other.save(folder)
        again = load_tokenizer(folder)
        assert (again.hash, again.vocabulary) == (other.hash, other.vocabulary)
        assert (other.hash == one.ours.hash) == (token_id == found)
        assert other.vocabulary == one.ours.vocabulary.model_copy(update={"bos_id": token_id})
        begin = [] if token_id is None else [token_id]
        theirs = transformers_tokenizer(folder)
        for text in ("Nine crates", "", " x</s>\n", *one.kind.special):
            ids = [*begin, *one.ours.encode_special(text)]
            assert theirs(text).input_ids == again.encode_prompt(text) == other.encode_prompt(text) == ids
            assert again.text_of(ids) == again.decode(ids[len(begin) :])
        if token_id != found:
            assert theirs("Nine", "x").input_ids == [*begin, *other.encode("Nine"), *begin, *other.encode("x")]
        assert other.with_bos(found).encode_prompt("x") == one.ours.encode_prompt("x")


def test_bos_can_be_switched_where_it_has_a_name(made: Callable[[str], Made], tmp_path: Path) -> None:
    begin = made("begins")
    without = begin.ours.with_bos_switch(False)
    assert without.encode_prompt("x") == begin.ours.encode_special("x")
    assert without.with_bos_switch(True).encode_prompt("x") == begin.ours.encode_prompt("x")
    without.save(tmp_path / "without")  # its name is remembered
    assert load_tokenizer(tmp_path / "without").with_bos_switch(True).vocabulary == begin.ours.vocabulary
    with pytest.raises(ValueError, match="declares no BOS: add a bos_token to its tokenizer_config"):
        made("byte-level").ours.with_bos_switch(True)
    with pytest.raises(ValueError, match="bos_id=9999 is not a token"):
        begin.ours.with_bos(9999)


def test_a_declared_bos_is_added_only_when_asked_for(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "chat", KINDS["chat"], bos_token="<|im_start|>")
    tokenizer = load_tokenizer(folder)
    start = tokenizer._backend.token_to_id("<|im_start|>")
    assert (tokenizer.vocabulary.bos_id, tokenizer.declared_bos_id) == (None, start)
    assert tokenizer.encode_prompt("x") == transformers_tokenizer(folder)("x").input_ids == tokenizer.encode("x")
    assert tokenizer.with_bos_switch(True).vocabulary.bos_id == start


def test_what_a_template_puts_behind_a_text_is_left_out(tmp_path: Path) -> None:
    kept = begins(byte_level(), "<|begin|> $A <|endoftext|>")
    config = {"eos_token": "<|endoftext|>"}
    tokenizer = load_tokenizer(write_backend(tmp_path / "both", kept, config))
    begin = tokenizer.vocabulary.bos_id
    cut = tokenizer.checked_template()
    assert cut.hash != tokenizer.hash
    cut.save(tmp_path / "cut")
    both, alone = (transformers_tokenizer(tmp_path / name)("x").input_ids for name in ("both", "cut"))
    assert both == [begin, *tokenizer.encode("x"), tokenizer.vocabulary.eos_id]
    assert alone == both[:-1] == cut.encode_prompt("x")
    assert load_tokenizer(tmp_path / "cut").checked_template().hash == cut.hash

    only_end = load_tokenizer(write_backend(tmp_path / "end", begins(byte_level(), "$A <|endoftext|>"), config))
    assert only_end.vocabulary.bos_id is None
    only_end.checked_template().save(tmp_path / "nothing")
    assert transformers_tokenizer(tmp_path / "nothing")("x").input_ids == only_end.encode("x")


def test_a_template_that_begins_with_two_tokens_is_refused(tmp_path: Path) -> None:
    backend = begins(byte_level(), "<|begin|> <|text|> $A")
    config = {"eos_token": "<|endoftext|>", "bos_token": "<|text|>"}
    tokenizer = load_tokenizer(write_backend(tmp_path / "two", backend, config))
    assert tokenizer.vocabulary.bos_id is None
    with pytest.raises(ValueError, match=r"begins every text with <\|begin\|> <\|text\|>, .* --bos or --no-bos"):
        tokenizer.checked_template()
    decided = tokenizer.with_bos_switch(True)
    assert decided.checked_template() is decided
    assert decided.encode_prompt("x") == [tokenizer._backend.token_to_id("<|text|>"), *tokenizer.encode("x")]
    assert tokenizer.with_bos_switch(False).checked_template().encode_prompt("x") == tokenizer.encode("x")


def classes_with_a_switch() -> list[str]:
    """Return the classes of transformers that add BOS in their own code."""
    import transformers

    models = Path(transformers.__file__).parent / "models"
    files = [file for file in models.glob("*/*_fast.py") if "add_bos_token" in (text := file.read_text("utf-8"))
             and "def update_post_processor" in text]  # fmt: skip
    lines = [line for file in files for line in file.read_text("utf-8").splitlines()]
    return sorted(line.split()[1].partition("(")[0] for line in lines if line.startswith("class "))


@pytest.mark.parametrize("switch", [None, True, False])
@pytest.mark.parametrize("template", ["", "<s> $A", "<s> $A </s>"])
def test_a_class_with_a_switch_begins_texts_by_it(switch: bool | None, template: str, tmp_path: Path) -> None:
    fast = classes_with_a_switch()
    assert {"LlamaTokenizerFast", "GemmaTokenizerFast"} <= set(fast)
    for name in (*fast, *(name.removesuffix("Fast") for name in fast), "PreTrainedTokenizerFast"):
        backend = pieces_with_bytes()
        backend.add_special_tokens(["▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>"])  # CodeLlama's
        backend = begins(backend, template) if template else backend
        config: dict[str, Any] = {"tokenizer_class": name, "eos_token": "</s>", "bos_token": "<s>"}
        config |= {} if switch is None else {"add_bos_token": switch}
        folder = write_backend(tmp_path / name, backend, config)
        tokenizer = load_tokenizer(folder)
        theirs = transformers_tokenizer(folder)("Nine").input_ids
        assert tokenizer.checked_template().encode_prompt("Nine") == theirs[: len(theirs) - theirs.count(2)], name
        tokenizer.save(tmp_path / f"{name} saved")
        assert load_tokenizer(tmp_path / f"{name} saved").vocabulary == tokenizer.vocabulary


def test_an_unchanged_tokeniser_has_the_hash_that_it_always_had(made: Callable[[str], Made]) -> None:
    """Compare with the hash of the data in tests/fixtures/format-3, and of a file that tokenizers wrote."""
    data = json.loads((Path(__file__).parents[1] / "fixtures/format-3/data/manifest.json").read_text("utf-8"))
    assert load_tokenizer("bytes").hash == load_tokenizer("bytes").checked_template().hash == data["tokenizer_hash"]
    for name in KINDS:
        ours = made(name).ours
        if name != "word-pieces":  # whose template is nothing, but whose file has none to compare
            assert ours.with_bos(ours.vocabulary.bos_id).hash == ours.hash == load_tokenizer(made(name).folder).hash


# --- tokenizer.model


def sentencepiece_folder(folder: Path) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3),
        model_writer=model,
        vocab_size=360,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return model.getvalue()


def test_a_sentencepiece_model_alone_is_converted(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = sentencepiece_folder(tmp_path / "model")
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = load_tokenizer(tmp_path / "model")
    assert load_tokenizer(tmp_path / "model" / "tokenizer.model").hash == tokenizer.hash
    assert tokenizer.vocabulary.bos_id == theirs.bos_id()
    assert tokenizer.vocabulary.size == theirs.vocab_size() + 1
    tokenizer.save(tmp_path / "saved")
    saved = transformers_tokenizer(tmp_path / "saved")

    @EXAMPLES
    @given(st.lists(st.sampled_from([*SENTENCES, *WORDS])).map("".join))
    def check(text: str) -> None:
        assert tokenizer.encode(text) == theirs.encode(text)
        assert tokenizer.encode_prompt(text) == [theirs.bos_id(), *theirs.encode(text)] == saved(text).input_ids
        assert tokenizer.text_of(tokenizer.encode_prompt(text)) == text

    check()


@pytest.mark.parametrize(
    ("missing", "needs"),
    [
        (["sentencepiece"], "sentencepiece"),
        (["google.protobuf"], "google.protobuf"),
        (["sentencepiece", "google.protobuf"], "sentencepiece and google.protobuf"),
    ],
)
def test_a_sentencepiece_model_says_which_packages_it_needs(
    missing: list[str], needs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = tokenizer_module.find_spec
    monkeypatch.setattr(tokenizer_module, "find_spec", lambda name: None if name in missing else find_spec(name))
    (tmp_path / "tokenizer.model").write_bytes(b"")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}', encoding="utf-8")
    way_out = rf"its conversion needs {needs}: pip install 'bd3_scale\[sentencepiece\]', or .*save_pretrained"
    with pytest.raises(ValueError, match=way_out) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_sentencepiece_model_says_so_where_no_package_of_google_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("google.protobuf")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "google", None)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ValueError, match=r"its conversion needs google\.protobuf: pip install"):
        load_tokenizer(tmp_path)


def test_a_broken_sentencepiece_model_says_what_to_do(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"transformers cannot convert .*tokenizer\.model .*save_pretrained"):
        load_tokenizer(tmp_path)
