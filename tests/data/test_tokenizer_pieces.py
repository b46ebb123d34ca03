"""Test text to tokens and back with many kinds of tokenisers, against transformers on the same folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bd3_scale.data.tokenizer import MASK, Tokenizer, load_tokenizer
from bd3_scale.generate.writer import kept_tokens
from tests.data.tokenisers import (
    EXAMPLES,
    KINDS,
    LOSSLESS,
    WORDS,
    Kind,
    Made,
    transformers_tokenizer,
)

BYTE_KINDS = tuple(name for name in LOSSLESS if KINDS[name].letters is None)


def plain_texts(kind: Kind) -> st.SearchStrategy[str]:
    """Draw texts that a kind can encode, without its filler and without U+FFFD, the mark of undecodable bytes."""
    letters = st.characters(codec="utf-8", exclude_characters=kind.filler + "\ufffd")
    if kind.letters is not None:
        letters = st.sampled_from(" " * 8 + kind.letters.replace(kind.filler, ""))
    words = [word for word in WORDS if kind.letters is None or set(word) <= {" ", *kind.letters}]
    words = [word.replace(kind.filler, "") for word in words]
    return st.lists(st.sampled_from(words) | st.text(letters, max_size=4), max_size=8).map("".join)


def odd_texts(kind: Kind) -> st.SearchStrategy[str]:
    """Draw texts that spell special tokens and masks, among anything else."""
    names = [*kind.special, MASK, "[MA", "SK]", "<|mask|>", "<s>", *WORDS]
    letters = st.text(st.characters(codec="utf-8"), max_size=4)
    return st.lists(st.sampled_from(names) | letters, max_size=10).map("".join)


def as_decoded(text: str, kind: Kind) -> str:
    return text.removeprefix(" ") if kind.eats_space else text


# --- prompts


@pytest.mark.parametrize("name", KINDS)
def test_a_prompt_is_what_transformers_makes_of_it_and_never_holds_the_mask(
    name: str, made: Callable[[str], Made], tmp_path: Path
) -> None:
    one = made(name)
    # Where their tokeniser knows the mask, one that knows it by another name.
    content = json.loads((one.folder / "tokenizer.json").read_text(encoding="utf-8"))
    mask_id = one.ours.vocabulary.mask_id
    for token in content["added_tokens"]:
        if token["id"] == mask_id:
            token["content"] = "<another name>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    config = json.loads((one.folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config.pop("mask_token", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    theirs = transformers_tokenizer(tmp_path)

    @EXAMPLES
    @given(odd_texts(one.kind))
    def check(text: str) -> None:
        ids = one.ours.encode_prompt(text)
        assert ids == theirs(text).input_ids
        assert mask_id not in ids
        if MASK not in text and "<|mask|>" not in text:
            assert ids == one.theirs(text).input_ids

    check()
    begin = [] if one.ours.vocabulary.bos_id is None else [one.ours.vocabulary.bos_id]
    for special in set(one.kind.special) - {one.ours.name_of(mask_id)}:
        assert one.ours.encode_prompt(special) == [*begin, one.theirs.convert_tokens_to_ids(special)]


@pytest.mark.parametrize("name", KINDS)
def test_plain_text_never_becomes_a_special_token(name: str, made: Callable[[str], Made]) -> None:
    one = made(name)
    unknown = {"<unk>", "[UNK]"}  # what no piece fits is this token, and rightly
    ids = {one.theirs.convert_tokens_to_ids(token) for token in one.kind.special if token not in unknown}
    ids.add(one.ours.vocabulary.mask_id)

    @EXAMPLES
    @given(odd_texts(one.kind))
    def check(text: str) -> None:
        plain = one.ours.encode(text)
        assert not ids & set(plain)
        assert one.ours.encode_batch([text, "x"]) == [plain, one.ours.encode("x")]
        assert one.ours.encode_batch([text, "x"], True) == [one.ours.encode_special(text), one.ours.encode_special("x")]

    check()


@pytest.mark.parametrize("name", LOSSLESS)
def test_text_comes_back(name: str, made: Callable[[str], Made]) -> None:
    one = made(name)

    @EXAMPLES
    @given(plain_texts(one.kind))
    def check(text: str) -> None:
        assert one.ours.decode(one.ours.encode(text)) == as_decoded(text, one.kind)
        assert one.ours.text_of(one.ours.encode_prompt(text)) == as_decoded(text, one.kind)

    check()


@pytest.mark.parametrize("name", KINDS)
def test_tokens_stand_where_transformers_says(name: str, made: Callable[[str], Made]) -> None:
    one = made(name)

    @EXAMPLES
    @given(odd_texts(one.kind).filter(lambda text: MASK not in text and "<|mask|>" not in text))
    def check(text: str) -> None:
        ids, places = one.ours.encode_spans(text)
        theirs = one.theirs(text, add_special_tokens=False, return_offsets_mapping=True)
        assert ids == theirs.input_ids == one.ours.encode_special(text)
        for (start, end), (first, last) in zip(places, theirs.offset_mapping, strict=True):
            # Theirs may leave spaces out.
            assert start <= first <= last <= end
            assert not text[start:first].strip()
            assert not text[last:end].strip()

    check()


def test_a_token_of_spaces_stands_where_its_spaces_do(made: Callable[[str], Made]) -> None:
    for name in ("byte-level", "llama-3"):
        one = made(name)
        text = "def weight():\n        return crates    <|endoftext|>"
        ids, places = one.ours.encode_spans(text)
        assert any(set(one.ours.name_of(token) or "") == {"Ġ"} for token in ids), "no token of spaces to look at"
        assert [text[start:end] for start, end in places] == [one.ours.decode([token]) for token in ids]


# --- gaps


@pytest.mark.parametrize("name", LOSSLESS)
def test_text_around_gaps_is_one_text(name: str, made: Callable[[str], Made]) -> None:
    """Check that a filled gap is exactly the letter of its token, at any position."""
    one = made(name)
    mask, begin = one.ours.vocabulary.mask_id, one.ours.encode_prompt("")
    filler = one.theirs.convert_tokens_to_ids(one.kind.filler)
    assert one.ours.decode([one.ours.encode("a")[-1], filler]) == "a" + one.kind.filler

    @settings(max_examples=50)
    @given(st.lists(st.just("") | plain_texts(one.kind), min_size=2, max_size=4))
    def check(pieces: list[str]) -> None:
        assume(MASK.join(pieces).split(MASK) == pieces)
        ids = one.ours.encode_prompt(MASK.join(pieces), gaps=True)
        assert ids[: len(begin)] == begin
        assert ids.count(mask) == len(pieces) - 1
        filled = one.ours.text_of([filler if token == mask else token for token in ids])
        assert filled == as_decoded(one.kind.filler.join(pieces), one.kind)
        assert one.ours.text_of(ids) == as_decoded((one.ours.name_of(mask) or "").join(pieces), one.kind)

    check()


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_gap_at_every_place_adds_no_space(name: str, made: Callable[[str], Made]) -> None:
    one = made(name)
    text = "Nine crates of lemons,\n each 12"
    mask, filler = one.ours.vocabulary.mask_id, one.theirs.convert_tokens_to_ids(one.kind.filler)
    for place in range(len(text) + 1):
        for gaps in (1, 2):
            ids = one.ours.encode_prompt(text[:place] + MASK * gaps + text[place:], gaps=True)
            filled = one.ours.text_of([filler if token == mask else token for token in ids])
            assert filled == text[:place] + one.kind.filler * gaps + text[place:]
            assert filled.replace(one.kind.filler, "") == text


def test_a_prefix_comes_before_the_text_and_not_behind_a_gap(made: Callable[[str], Made]) -> None:
    for name in ("prefixed", "llama-2", "metaspace-always", "metaspace-first"):
        one = made(name)
        mask = one.ours.vocabulary.mask_id
        x = one.theirs.convert_tokens_to_ids("x")
        first = one.ours.encode_prompt("x")
        assert len(first) > 1
        assert one.ours.encode_prompt("x[MASK]x[MASK][MASK]x", gaps=True) == [*first, mask, x, mask, mask, x]
        assert one.ours.encode_prompt("[MASK]x", gaps=True) == [*one.ours.encode_prompt(""), mask, x]


def test_special_tokens_are_parsed_behind_a_gap_and_other_masks_are_text(made: Callable[[str], Made]) -> None:
    for name in ("chat", "own mask"):
        one = made(name)
        end = one.theirs.convert_tokens_to_ids("<|im_end|>")
        ids = one.ours.encode_prompt("a[MASK]<|im_end|>b[MASK]<|mask|>", gaps=True)
        mask = one.ours.vocabulary.mask_id
        assert ids == [*one.ours.encode("a"), mask, end, *one.ours.encode("b"), mask, *one.ours.encode("<|mask|>")]
        assert ids.count(mask) == 2


# --- what tokens add to a text


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_continuation_is_what_the_text_has_more(name: str, made: Callable[[str], Made]) -> None:
    one = made(name)

    @EXAMPLES
    @given(plain_texts(one.kind))
    def check(text: str) -> None:
        ids = one.ours.encode_prompt(text)
        whole = one.ours.text_of(ids)
        for split in range(len(ids) + 1):
            begin, more = one.ours.text_of(ids[:split]), one.ours.continuation(ids[:split], ids[split:])
            kept = begin
            if "\ufffd" in begin:  # within a character, which is the continuation's then
                kept = whole[: len(whole) - len(more)]
                assert begin.startswith(kept)
                assert set(begin[len(kept) :]) == {"\ufffd"}
            assert kept + more == whole

    check()


@pytest.mark.parametrize("name", KINDS)
def test_a_stop_string_that_begins_with_a_space_is_found(name: str, made: Callable[[str], Made]) -> None:
    tokenizer = made(name).ours
    prompt = tokenizer.encode_prompt("the lock and")
    ids = tokenizer.encode_prompt("the lock and crates of lemons")
    assert ids[: len(prompt)] == prompt
    for stop in (" crates", " of", " lemons", "s of"):
        kept = kept_tokens(tokenizer, prompt, ids[len(prompt) :], [stop])
        held = [
            stop in tokenizer.text_of(ids)[len("the lock and") :] for ids in (ids[:end] for end in ends(prompt, ids))
        ]
        assert kept == held.index(True)
    assert kept_tokens(tokenizer, prompt, ids[len(prompt) :], ["  crates"]) is None


def ends(prompt: list[int], ids: list[int]) -> range:
    return range(len(prompt), len(ids) + 1)


# --- streams


def streamed(tokenizer: Tokenizer, before: list[int], new: list[int]) -> list[str]:
    return [tokenizer.continuation(before, new[:count], final=False) for count in range(len(new) + 1)]


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_stream_only_grows_and_ends_in_whole_characters(name: str, made: Callable[[str], Made]) -> None:
    one = made(name)

    @EXAMPLES
    @given(plain_texts(one.kind), st.data())
    def check(text: str, data: st.DataObject) -> None:
        ids = one.ours.encode_prompt(text)
        split = data.draw(st.integers(0, len(ids)))
        before, new = ids[:split], ids[split:]
        texts = streamed(one.ours, before, new)
        for shorter, longer in zip(texts, [*texts[1:], one.ours.continuation(before, new)], strict=True):
            assert longer.startswith(shorter)
            assert "\ufffd" not in shorter
        assert texts[-1] == one.ours.continuation(before, new)

    check()


def test_a_stream_shows_a_character_with_its_last_byte(made: Callable[[str], Made]) -> None:
    text = "é日\U0001f600!日"
    for name in BYTE_KINDS:
        tokenizer = made(name).ours
        before = tokenizer.encode_prompt("x")
        ids = tokenizer.encode_prompt("x" + text)[len(before) :]
        assert len(ids) > len(text), "no character is split"
        shown = [text[: len(seen)] for seen in streamed(tokenizer, before, ids)]
        assert streamed(tokenizer, before, ids) == shown
        # No later than by the bytes: a token may hold several.
        assert len(set(shown)) == len(text) + 1, name


@given(st.binary(max_size=12), st.integers(0, 3))
def test_a_stream_of_bytes_that_are_no_text_only_grows(content: bytes, split: int) -> None:
    tokenizer = load_tokenizer("bytes")
    before, new = list(content[:split]), list(content[split:])
    texts = [*streamed(tokenizer, before, new), tokenizer.continuation(before, new)]
    for shorter, longer in pairwise(texts):
        assert longer.startswith(shorter)
        assert not shorter.endswith("\ufffd")
    if split == 0:
        assert texts[-1] == content.decode("utf-8", "replace")
