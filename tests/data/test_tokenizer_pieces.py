"""Text to tokens and back with tokenisers of many kinds, beside transformers on the same folders."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bd3_scale.data import tokenizer as tokenizer_module
from bd3_scale.data.tokenizer import MASK, Tokenizer, load_tokenizer
from bd3_scale.evaluate.writing import kept_tokens
from tests.data.tokenisers import (
    KINDS,
    LOSSLESS,
    SENTENCES,
    Kind,
    Made,
    begins,
    byte_level,
    make,
    pieces_with_bytes,
    transformers_tokenizer,
    write_backend,
    write_tokenizer,
)

EXAMPLES = settings(max_examples=30)
WORDS = (
    " ",
    "  ",
    "\n",
    "\n\n",
    "Nine crates",
    " of lemons",
    "12",
    "    return x",
    "é",
    "日本",
    "\U0001f600",
    "a\u0301",
)
BYTE_KINDS = tuple(name for name in LOSSLESS if KINDS[name].letters is None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    folder = tmp_path_factory.mktemp("kinds")
    found: dict[str, Made] = {}

    def of(name: str) -> Made:
        if name not in found:
            found[name] = make(folder / name, name)
        return found[name]

    return of


def plain_texts(kind: Kind) -> st.SearchStrategy[str]:
    """Texts of what a kind knows, without its filler and without U+FFFD, which undecodable bytes become."""
    letters = st.characters(codec="utf-8", exclude_characters=kind.filler + "\ufffd")
    if kind.letters is not None:
        letters = st.sampled_from(" " * 8 + kind.letters.replace(kind.filler, ""))
    words = [word for word in WORDS if kind.letters is None or set(word) <= {" ", *kind.letters}]
    words = [word.replace(kind.filler, "") for word in words]
    return st.lists(st.sampled_from(words) | st.text(letters, max_size=4), max_size=8).map("".join)


def odd_texts(kind: Kind) -> st.SearchStrategy[str]:
    """Texts that spell special tokens and masks, beside anything else."""
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
    with pytest.raises(ValueError, match="names no beginning of text: add a bos_token to its tokenizer_config"):
        made("byte-level").ours.with_bos_switch(True)
    with pytest.raises(ValueError, match="bos_id=9999 is no token"):
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
    """The classes of transformers that put BOS in front by their own code."""
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
    """As of the data in tests/fixtures/format-3, and of a file that tokenizers wrote."""
    data = json.loads((Path(__file__).parents[1] / "fixtures/format-3/data/manifest.json").read_text("utf-8"))
    assert load_tokenizer("bytes").hash == load_tokenizer("bytes").checked_template().hash == data["tokenizer_hash"]
    for name in KINDS:
        ours = made(name).ours
        if name != "word-pieces":  # whose template is nothing, but whose file has none to compare
            assert ours.with_bos(ours.vocabulary.bos_id).hash == ours.hash == load_tokenizer(made(name).folder).hash


# --- gaps


@pytest.mark.parametrize("name", LOSSLESS)
def test_text_around_gaps_is_one_text(name: str, made: Callable[[str], Made]) -> None:
    """A gap that a token fills is that token's letter, and nothing else, wherever it stands."""
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
    way_out = rf"converting it needs {needs}: pip install 'bd3_scale\[sentencepiece\]', or .*save_pretrained"
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
    with pytest.raises(ValueError, match=r"converting it needs google\.protobuf: pip install"):
        load_tokenizer(tmp_path)


def test_a_broken_sentencepiece_model_says_what_to_do(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"transformers cannot convert .*tokenizer\.model .*save_pretrained"):
        load_tokenizer(tmp_path)
