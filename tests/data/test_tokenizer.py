from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from bd3_scale.data.tokenizer import EOS, Tokenizer, load_tokenizer, train_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog. " * 3 + "naïve café 日本語 [MASK] <|endoftext|>\r\n\t\0"
BYTES = load_tokenizer("bytes")
any_text = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from(["[MASK]", "<|endoftext|>", " ", "a", "é", "\U0001f600"])
).map("".join)


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    train_tokenizer([folder / "text.txt"], folder / "trained", 280, progress=False)
    return folder / "trained"


@given(any_text)
def test_bytes_are_the_utf8_bytes(text: str) -> None:
    assert BYTES.encode(text) == list(text.encode("utf-8"))
    assert BYTES.decode(BYTES.encode(text)) == text
    assert (BYTES.vocabulary.size, BYTES.vocabulary.eos_id, BYTES.vocabulary.mask_id) == (258, 256, 257)


def test_trained_round_trips_and_never_yields_special_ids(trained_folder: Path) -> None:
    tokenizer = load_tokenizer(trained_folder)
    assert tokenizer.vocabulary.size == 281
    assert tokenizer.vocabulary.mask_id == 280
    special = {tokenizer.vocabulary.eos_id, tokenizer.vocabulary.mask_id}

    @given(any_text)
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not special & set(ids)
        assert tokenizer.encode_batch([text, "x"]) == [ids, tokenizer.encode("x")]

    check()


@pytest.mark.parametrize("name", ["bytes", "trained"])
def test_saved_reloads_equal_and_transformers_agrees(name: str, trained_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer("bytes" if name == "bytes" else trained_folder)
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert (again.hash, again.vocabulary) == (tokenizer.hash, tokenizer.vocabulary)
    assert load_tokenizer(tmp_path / "saved" / "tokenizer.json").hash == tokenizer.hash
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (theirs.eos_token_id, theirs.mask_token_id) == (tokenizer.vocabulary.eos_id, tokenizer.vocabulary.mask_id)
    assert len(theirs) == tokenizer.vocabulary.size
    assert theirs.encode("naïve café 日本語") == tokenizer.encode("naïve café 日本語")


@pytest.mark.launch
def test_training_is_deterministic_across_processes(trained_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    code = f"""
from pathlib import Path
from bd3_scale.data.tokenizer import train_tokenizer
train_tokenizer([{str(trained_folder.parent / "text.txt")!r}], Path({str(out)!r}), 280, progress=False)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert (out / "tokenizer.json").read_bytes() == (trained_folder / "tokenizer.json").read_bytes()


def test_pickled_still_does_not_yield_special_ids() -> None:
    again = pickle.loads(pickle.dumps(BYTES))
    assert again.encode(TEXT) == list(TEXT.encode("utf-8"))
    assert again.hash == BYTES.hash


def test_decode_shows_mask_and_end_and_replaces_broken_utf8() -> None:
    ids = [*b"a", 257, *"é".encode()[:1], 256, *b"b"]
    assert BYTES.decode(ids) == "a[MASK]\ufffd<|endoftext|>b"
    assert BYTES.decode(ids, skip_eos=True) == "a[MASK]\ufffdb"


@pytest.mark.parametrize("bad", [-1, 258, 383])
def test_decode_refuses_ids_outside_the_vocabulary(bad: int) -> None:
    with pytest.raises(ValueError, match=f"token id {bad} "):
        BYTES.decode([65, bad])


def hugging_face_folder(folder: Path, tokens: list[str], config: dict[str, object]) -> Path:
    vocabulary = {"a": 0, "b": 1, " ": 2, "[": 3, "M": 4, "]": 5, "<": 6, "e": 7, ">": 8, "ab": 9}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    backend.add_tokens(tokens)
    backend.enable_truncation(2)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_hugging_face_folder_with_declared_special_tokens(tmp_path: Path) -> None:
    config = {"eos_token": {"content": "<e>", "__type": "AddedToken"}, "mask_token": "[M]"}
    tokenizer = load_tokenizer(hugging_face_folder(tmp_path / "hf", ["[M]", "<e>", "[X]"], config))
    assert (tokenizer.vocabulary.mask_id, tokenizer.vocabulary.eos_id, tokenizer.vocabulary.size) == (10, 11, 13)
    assert tokenizer.encode("ab[M]<e>") == [9, 3, 4, 5, 6, 7, 8]  # whole, though the file asks for truncation
    assert tokenizer.decode([9, 10, 12]) == "ab [M] [X]"


def test_hugging_face_folder_without_mask_gets_an_id_of_its_own(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(hugging_face_folder(tmp_path / "hf", ["<e>"], {"eos_token": "<e>"}))
    assert (tokenizer.vocabulary.mask_id, tokenizer.vocabulary.size) == (11, 12)


def test_a_special_token_that_text_can_spell_is_refused(tmp_path: Path) -> None:
    folder = hugging_face_folder(tmp_path / "hf", ["<e>"], {"eos_token": "<e>", "mask_token": "ab"})
    with pytest.raises(ValueError, match="text that spells 'ab'"):
        load_tokenizer(folder)


def test_hugging_face_folder_without_end_of_document(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="eos_token"):
        load_tokenizer(hugging_face_folder(tmp_path / "hf", [], {}))


def test_a_bare_file_needs_the_usual_end_of_document(tmp_path: Path) -> None:
    folder = hugging_face_folder(tmp_path / "hf", ["<e>"], {})
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"'<\|endoftext\|>' is not in the vocabulary"):
        load_tokenizer(folder / "tokenizer.json")


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no tokeniser at"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="can read"):
        load_tokenizer(tmp_path)
    BYTES.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="is not JSON"):
        load_tokenizer(tmp_path)


def test_training_needs_room_and_text(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("too short", encoding="utf-8")
    with pytest.raises(ValueError, match="vocab_size=256"):
        train_tokenizer([tmp_path / "t.txt"], tmp_path / "out", 256)
    with pytest.raises(ValueError, match="yields only"):
        train_tokenizer([tmp_path / "t.txt"], tmp_path / "out", 5000, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.txt"]


def test_hash_tells_tokenisers_apart(trained_folder: Path) -> None:
    assert load_tokenizer(trained_folder).hash != BYTES.hash
    assert isinstance(BYTES, Tokenizer)


def test_a_vocabulary_with_holes_gets_no_mask_in_the_place_of_a_token() -> None:
    """Check a vocabulary with gaps: the library numbers a new token by the count of tokens, which may be a used id."""
    vocabulary = {character: i for i, character in enumerate("abcdefg")} | {"h": 8, EOS: 7}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    assert Tokenizer(backend).vocabulary.mask_id == 9
    holed = {character: i for i, character in enumerate("abcdefg")} | {"h": 9, EOS: 7}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=holed, merges=[]))
    with pytest.raises(ValueError, match=r"leaves ids out, and the new token .* would take the id 9 of another one"):
        Tokenizer(backend)
