"""Test what is shown and what counts in conversations and in documents with BOS, in shards and batches."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bd3_scale.data.batch import Batch, collate
from bd3_scale.data.chat import ChatTemplate
from bd3_scale.data.manifest import Manifest, Split, SplitName, load_manifest
from bd3_scale.data.prepare import prepare
from bd3_scale.data.shards import open_shards
from bd3_scale.data.tokenizer import Tokenizer, load_tokenizer
from bd3_scale.evaluate.text_statistics import counted_bytes
from bd3_scale.recipe.schema import DataRecipe
from tests.data.documents import write_jsonl
from tests.data.tokenisers import CHAT_TEMPLATE, KINDS, MARKED_TEMPLATE, SENTENCES, write_tokenizer

L, MULTIPLE = 32, 8
Message = dict[str, str]


@dataclass
class Flags:
    """Tokens in a row, and which of them are shown and which count."""

    tokens: list[int] = field(default_factory=list)
    shown: list[bool] = field(default_factory=list)
    counted: list[bool] = field(default_factory=list)

    def add(self, tokens: Sequence[int], kind: str) -> None:
        self.tokens += tokens
        self.shown += [kind == "shown"] * len(tokens)
        self.counted += [kind == "counts"] * len(tokens)

    def end(self, eos: int, kind: str, padding: str) -> None:
        self.add([eos], kind)
        self.pad(eos, padding, MULTIPLE)

    def pad(self, eos: int, padding: str, multiple: int) -> None:
        self.add([eos] * (-len(self.tokens) % multiple), padding)


def run(sources: Sequence[Path], out: Path, tokenizer: Tokenizer, **options: Any) -> Manifest:
    defaults = {"document_multiple": MULTIPLE, "holdout": 1.0, "workers": 1, "progress": False}
    return prepare(sources, out, tokenizer, L, **(defaults | options))


def samples_of(folder: Path, split: SplitName = "validation") -> list[dict[str, Any]]:
    shards = open_shards(DataRecipe(path=str(folder), seq_len=L), load_manifest(folder), split)
    return [shards[index] for index in range(len(shards))]


def batch_of(samples: Sequence[dict[str, Any]]) -> Batch:
    ids = np.arange(len(samples), dtype=np.int64)
    return collate(samples, ids, ids, isolate_documents=True)


def batches_of(samples: Sequence[dict[str, Any]], size: int = 3) -> Iterator[Batch]:
    return (batch_of(samples[start : start + size]) for start in range(0, len(samples), size))


def kept(flags: Flags, length: int) -> Flags:
    """Return the sequences without those that are shown whole, which preparation drops."""
    rows = [range(start, start + length) for start in range(0, len(flags.tokens), length)]
    places = [place for row in rows if not all(flags.shown[i] for i in row) for place in row]
    return Flags(*([values[i] for i in places] for values in (flags.tokens, flags.shown, flags.counted)))


def check_flags(samples: Sequence[dict[str, Any]], expected: Flags, split: Split) -> None:
    batch = batch_of(samples)
    for found, wanted in ((batch.tokens, expected.tokens), (batch.shown, expected.shown)):
        assert found.flatten().tolist() == wanted
    assert batch.counted.flatten().tolist() == expected.counted
    assert not (batch.shown & batch.counted).any()
    assert (split.shown_tokens, split.counted_tokens) == (sum(expected.shown), sum(expected.counted))
    assert split.sequences == len(samples)


# --- conversations


def chat_folder(folder: Path, template: str = CHAT_TEMPLATE, eos: str = "<|endoftext|>") -> Path:
    return write_tokenizer(folder, KINDS["chat"], chat_template=template, eos_token=eos)


def write_conversations(path: Path, conversations: Sequence[Sequence[Message]], name: str = "messages") -> Path:
    path.write_text("".join(json.dumps({name: messages}) + "\n" for messages in conversations), encoding="utf-8")
    return path


def some_conversations(count: int, seed: int = 0) -> list[list[Message]]:
    """Draw conversations of one to six messages, one of them the assistant's; some end with a user's."""
    draw = random.Random(seed)

    def said(role: str) -> Message:
        return {"role": role, "content": " ".join(draw.choice(SENTENCES).strip() for _ in range(draw.randint(1, 2)))}

    found = []
    for _ in range(count):
        roles = [draw.choice(["system", "user", "assistant", "tool"]) for _ in range(draw.randint(0, 5))]
        roles.insert(draw.randint(0, len(roles)), "assistant")
        found.append([said(role) for role in roles])
    return found


def walked(conversations: Sequence[Sequence[Message]], tokenizer: Tokenizer, *, newline: str) -> Flags:
    """Return the expected flags of the tokens, by message; `newline`: the flag of the newline after an answer."""
    flags, eos = Flags(), tokenizer.vocabulary.eos_id
    for messages in conversations:
        whole = len(flags.tokens)
        for message in messages:
            kind = "counts" if message["role"] == "assistant" else "shown"
            flags.add(tokenizer.encode_special(f"<|im_start|>{message['role']}\n"), "shown")
            flags.add(tokenizer.encode_special(f"{message['content']}<|im_end|>"), kind)
            flags.add(tokenizer.encode_special("\n"), newline if kind == "counts" else "shown")
        text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in messages)
        assert flags.tokens[whole:] == tokenizer.encode_special(text), "the pieces are no longer the text's tokens"
        answered = messages[-1]["role"] == "assistant"
        flags.end(eos, "counts" if answered else "shown", "padding" if answered else "shown")
    return flags


@pytest.mark.parametrize("eos", ["<|endoftext|>", "<|im_end|>"])
@pytest.mark.parametrize(("template", "newline"), [(CHAT_TEMPLATE, "counts"), (MARKED_TEMPLATE, "shown")])
def test_what_the_assistant_says_counts_and_all_else_is_shown(
    template: str, newline: str, eos: str, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(chat_folder(tmp_path / "chat", template, eos))
    conversations = some_conversations(12)
    assert {messages[-1]["role"] == "assistant" for messages in conversations} == {True, False}
    source = write_conversations(tmp_path / "c.jsonl", conversations)
    manifest = run([source], tmp_path / "data", tokenizer, chat=ChatTemplate(tmp_path / "chat"))
    samples = samples_of(tmp_path / "data")
    assert any(len(sample["document_lengths"]) > 1 for sample in samples)
    assert any((sample["shown"][:, 1] == L).any() for sample in samples), "no shown text is cut by a sequence's end"

    expected = walked(conversations, tokenizer, newline=newline)
    expected.pad(tokenizer.vocabulary.eos_id, "padding", L)
    assert manifest.validation is not None
    assert manifest.validation.dropped_tokens == len(expected.tokens) - len(kept(expected, L).tokens)
    check_flags(samples, kept(expected, L), manifest.validation)
    assert manifest.messages
    assert manifest.shows_tokens
    assert manifest.validation.documents == len(conversations)
    assert ChatTemplate(tmp_path / "data").template == template, "the data have their template"
    assert ChatTemplate(tmp_path / "data").spans(conversations[0]) == ChatTemplate(tmp_path / "chat").spans(
        conversations[0]
    )


def test_training_drops_what_does_not_fill_a_sequence(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(chat_folder(tmp_path / "chat"))
    conversations = some_conversations(13, seed=1)
    source = write_conversations(tmp_path / "c.jsonl", conversations)
    manifest = run([source], tmp_path / "data", tokenizer, chat=ChatTemplate(tmp_path / "chat"), holdout=0.0)
    whole = walked(conversations, tokenizer, newline="counts")
    full = len(whole.tokens) // L * L
    assert manifest.validation is None
    assert manifest.train is not None
    expected = kept(Flags(whole.tokens[:full], whole.shown[:full], whole.counted[:full]), L)
    assert manifest.train.dropped_tokens == len(whole.tokens) - len(expected.tokens) > len(whole.tokens) - full > 0
    check_flags(samples_of(tmp_path / "data", "train"), expected, manifest.train)


def test_a_person_who_has_the_last_word_trains_no_end(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(chat_folder(tmp_path / "chat"))
    answer = {"role": "assistant", "content": "Nine."}
    for name, messages in {"answered": [answer], "asked": [answer, {"role": "user", "content": "And lemons?"}]}.items():
        source = write_conversations(tmp_path / f"{name}.jsonl", [messages])
        run([source], tmp_path / name, tokenizer, chat=ChatTemplate(tmp_path / "chat"))
        batch = batch_of(samples_of(tmp_path / name))
        end = "<|endoftext|>" if name == "answered" else ""
        assert tokenizer.decode(batch.tokens[batch.counted].tolist()) == "Nine.<|im_end|>\n" + end
        ends = batch.tokens == tokenizer.vocabulary.eos_id
        assert bool(batch.shown[ends].any()) == (name == "asked")


def test_a_token_that_is_an_answer_in_part_is_trained_on(tmp_path: Path) -> None:
    """Check it with a template whose prompt ends in a space, which the answer's first token includes."""
    template = CHAT_TEMPLATE.replace("\n{{", ": {{").replace("assistant\n", "assistant: ")
    tokenizer = load_tokenizer(chat_folder(tmp_path / "chat", template))
    messages = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "crates    "}]
    source = write_conversations(tmp_path / "c.jsonl", [messages])
    run([source], tmp_path / "data", tokenizer, chat=ChatTemplate(tmp_path / "chat"))
    batch = batch_of(samples_of(tmp_path / "data"))
    assert tokenizer.decode(batch.tokens[batch.counted].tolist()) == " crates    <|im_end|>\n<|endoftext|>"


def test_an_answer_that_ends_in_spaces_is_trained_on_to_its_end(tmp_path: Path) -> None:
    """Check it also for tokenisers whose offsets leave spaces out, as Llama 3's."""
    template = (
        "{% for turn in messages %}{% if turn['role'] == 'assistant' %}{% generation %}{{ turn['content'] }}"
        "{% endgeneration %}{% else %}{{ turn['content'] }}{% endif %}<|endoftext|>{% endfor %}"
    )
    folder = write_tokenizer(tmp_path / "chat", KINDS["llama-3"], chat_template=template)
    tokenizer = load_tokenizer(folder).with_bos(None)
    messages = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "return crates * each    "}]
    assert len(tokenizer.encode("    ")) == 1
    source = write_conversations(tmp_path / "c.jsonl", [messages])
    run([source], tmp_path / "data", load_tokenizer(folder), chat=ChatTemplate(folder))
    batch = batch_of(samples_of(tmp_path / "data"))
    assert tokenizer.decode(batch.tokens[batch.counted].tolist(), skip_eos=True) == messages[1]["content"]


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bd3_scale.data.encode.CHUNK_CHARACTERS", 500)
    tokenizer = load_tokenizer(chat_folder(tmp_path / "chat"))
    source = write_conversations(tmp_path / "c.jsonl", some_conversations(20, seed=2))
    for workers in (1, 2):
        chat = ChatTemplate(tmp_path / "chat")
        run([source], tmp_path / str(workers), tokenizer, chat=chat, workers=workers, holdout=0.3, seed=3)
    one, two = tmp_path / "1", tmp_path / "2"
    files = sorted(file.relative_to(one) for file in one.rglob("*") if file.is_file())
    assert files == sorted(file.relative_to(two) for file in two.rglob("*") if file.is_file())
    assert len(files) > 8
    assert [name for name in files if (one / name).read_bytes() != (two / name).read_bytes()] == []


# --- documents


@pytest.mark.parametrize("kind", ["begins", "llama-3", "llama-2"])
def test_what_a_document_begins_with_is_shown_once(kind: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "kind", KINDS[kind]))
    bos, eos = tokenizer.vocabulary.bos_id, tokenizer.vocabulary.eos_id
    assert bos is not None
    texts = some_texts(10)
    manifest = run([write_jsonl(tmp_path / "t.jsonl", texts)], tmp_path / "data", tokenizer)
    samples = samples_of(tmp_path / "data")
    expected = Flags()
    for text in texts:
        expected.add([bos], "shown")
        expected.add(tokenizer.encode(text), "counts")
        expected.end(eos, "counts", "padding")
    expected.pad(eos, "padding", L)
    assert manifest.validation is not None
    check_flags(samples, expected, manifest.validation)
    assert manifest.validation.shown_tokens == len(texts)
    starts = [
        [sum(sample["document_lengths"][:i]) for i in range(len(sample["document_lengths"]))] for sample in samples
    ]
    assert any(not len(sample["shown"]) or sample["shown"][0, 0] > 0 for sample in samples), "no document is cut"
    assert all(first in places for sample, places in zip(samples, starts, strict=True) for first, _ in sample["shown"])
    assert (manifest.vocabulary.bos_id, manifest.messages, manifest.shows_tokens) == (bos, False, True)
    assert json.loads((tmp_path / "data" / "manifest.json").read_text())["vocabulary"]["bos_id"] == bos


def some_texts(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(SENTENCES, k=draw.randint(1, 4))).strip() for _ in range(count)]


def test_plain_documents_are_as_they_always_were(tmp_path: Path) -> None:
    texts = some_texts(10)
    source = write_jsonl(tmp_path / "t.jsonl", texts)
    manifest = run([source], tmp_path / "data", load_tokenizer("bytes"), holdout=0.5)
    for split in ("train", "validation"):
        index = json.loads((tmp_path / "data" / split / "index.json").read_text())
        assert [shard["column_names"] for shard in index["shards"]] == [
            ["counted_lengths", "document_lengths", "tokens"]
        ]
        batch = batch_of(samples_of(tmp_path / "data", split))
        assert not batch.shown.any()
        assert int(batch.counted.sum()) == getattr(manifest, split).counted_tokens
    written = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert set(written) == {
        *("format_version", "vocabulary", "tokenizer_hash", "seq_len", "document_multiple", "holdout", "seed"),
        *("empty_documents", "sources", "train", "validation"),
    }
    assert set(written["vocabulary"]) == {"size", "eos_id", "mask_id", "rows"}
    split_keys = {"documents", "sequences", "counted_tokens", "dropped_tokens", "text_bytes"}
    assert set(written["train"]) == set(written["validation"]) == split_keys


@pytest.mark.parametrize("parse_special", [True, False])
def test_special_tokens_in_documents_are_parsed_only_when_asked_for(parse_special: bool, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(chat_folder(tmp_path / "chat"))
    texts = ["<|im_start|>a[MASK]<|endoftext|>b<|im_end|>", "Nine crates"]
    manifest = run(
        [write_jsonl(tmp_path / "t.jsonl", texts)], tmp_path / "data", tokenizer, parse_special=parse_special
    )
    expected, eos = Flags(), tokenizer.vocabulary.eos_id
    name = tokenizer._backend.token_to_id
    parsed = [name("<|im_start|>"), *tokenizer.encode("a[MASK]"), eos, *tokenizer.encode("b"), name("<|im_end|>")]
    for ids in (parsed if parse_special else tokenizer.encode(texts[0]), tokenizer.encode(texts[1])):
        expected.add(ids, "counts")
        expected.end(eos, "counts", "padding")
    expected.pad(eos, "padding", L)
    assert manifest.validation is not None
    check_flags(samples_of(tmp_path / "data"), expected, manifest.validation)
    assert tokenizer.vocabulary.mask_id not in expected.tokens
    assert ("parse_special" in json.loads((tmp_path / "data" / "manifest.json").read_text())) == parse_special


# --- bytes of what counts


def bytes_of_pieces(name: str) -> bytes:
    """Return the bytes that a SentencePiece token stands for, from its name alone."""
    return bytes([int(name[3:5], 16)]) if name.startswith("<0x") else name.replace("▁", " ").encode()


def bytes_of_letters(name: str) -> bytes:
    """Return the bytes that a token of byte-level BPE stands for, like `bytes_of_pieces`."""
    return bytes(BYTE_OF_LETTER[letter] for letter in name)


BYTE_OF_LETTER = {load_tokenizer("bytes").name_of(byte): byte for byte in range(256)}


@pytest.mark.parametrize("kind", ["bytes", "byte-level", "begins", "llama-3", "llama-2", "metaspace-first"])
def test_counted_bytes_are_those_of_the_text(kind: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "kind", KINDS[kind]))
    emoji = [] if KINDS[kind].letters else ["日本\U0001f600 é日本" * 12, "\U0001f600" * 30]
    texts = [*some_texts(6), *emoji, *some_texts(3, seed=1)]
    manifest = run([write_jsonl(tmp_path / "t.jsonl", texts)], tmp_path / "data", tokenizer)
    samples = samples_of(tmp_path / "data")
    assert manifest.validation is not None
    for size in (1, 3, len(samples)):
        whole = counted_bytes(batches_of(samples, size), tokenizer)
        assert whole == sum(len(text.encode()) for text in texts) == manifest.validation.text_bytes

    cut_within = 0
    for count in range(1, len(samples)):
        batch = batch_of(samples[:count])
        documents: list[list[int]] = [[]]
        for token in batch.tokens[batch.counted].tolist():
            if token == tokenizer.vocabulary.eos_id:
                documents.append([])
            else:
                documents[-1].append(token)
        is_pieces = kind in ("llama-2", "metaspace-first")
        of_name = bytes_of_pieces if is_pieces else bytes_of_letters
        found = [b"".join(of_name(tokenizer.name_of(token) or "") for token in ids) for ids in documents]
        begun = [content[1:] if is_pieces else content for content in found]  # the ▁ before a text is none of it
        last = begun[-1].decode("utf-8", "ignore")
        cut_within += len(last.encode()) < len(begun[-1])
        expected = sum(map(len, begun[:-1])) + len(last.encode())
        assert counted_bytes(batches_of(samples[:count]), tokenizer) == expected
    assert not emoji or cut_within, "no sequence ends within a character"


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED_TEMPLATE])
def test_counted_bytes_of_conversations_are_the_assistants(template: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(chat_folder(tmp_path / "chat", template))
    conversations = some_conversations(8, seed=4)
    source = write_conversations(tmp_path / "c.jsonl", conversations)
    manifest = run([source], tmp_path / "data", tokenizer, chat=ChatTemplate(tmp_path / "chat"))
    samples = samples_of(tmp_path / "data")
    end = "<|im_end|>\n" if template == CHAT_TEMPLATE else "<|im_end|>"
    said = [turn["content"] + end for turns in conversations for turn in turns if turn["role"] == "assistant"]
    assert manifest.validation is not None
    assert manifest.validation.text_bytes == sum(len(text.encode()) for text in said)
    assert counted_bytes(batches_of(samples), tokenizer) == manifest.validation.text_bytes

    names = {tokenizer._backend.token_to_id(name): name.encode() for name in KINDS["chat"].special}
    for count in range(1, len(samples)):
        batch = batch_of(samples[:count])
        tokens = batch.tokens[batch.counted & (batch.tokens != tokenizer.vocabulary.eos_id)].tolist()
        content = b"".join(names.get(token) or bytes_of_letters(tokenizer.name_of(token) or "") for token in tokens)
        if content.decode("utf-8", "ignore").encode() == content:  # no answer is cut within a character
            assert counted_bytes(batches_of(samples[:count]), tokenizer) == len(content)


# --- what cannot be


ANSWER = {"role": "assistant", "content": "Nine crates of lemons, each 12."}
REFUSED = {
    "no assistant": ([{"role": "user", "content": "Hello"}], "has no message of the role 'assistant'"),
    "an empty list": ([], 'has an empty list in "messages"'),
    "null": ([{"role": "assistant", "content": None}], r'messages\[0\] has null in the field "content"'),
    "a string": ("Hello", 'has a string in "messages"'),
    "no role": ([{"content": "Hello"}], r'messages\[0\] has no field "role"'),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_line_that_is_no_conversation_is_named(why: str, tmp_path: Path) -> None:
    tokenizer, (value, message) = load_tokenizer(chat_folder(tmp_path / "chat")), REFUSED[why]
    source = tmp_path / "c.jsonl"
    lines = [{"messages": [ANSWER]}, {"messages": value}, {"messages": [ANSWER]}]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    chat = ChatTemplate(tmp_path / "chat")
    with pytest.raises(ValueError, match=rf"{source}:2.*{message}"):
        run([source], tmp_path / "data", tokenizer, chat=chat)
    assert not (tmp_path / "data").exists()
    manifest = run([source], tmp_path / "data", tokenizer, chat=chat, on_error="skip")
    assert manifest.skipped_documents == 1
    assert manifest.validation is not None
    assert manifest.validation.documents == 2


def test_conversations_lie_in_the_field_that_is_named(tmp_path: Path) -> None:
    tokenizer, chat = load_tokenizer(chat_folder(tmp_path / "chat")), ChatTemplate(tmp_path / "chat")
    source = write_conversations(tmp_path / "c.jsonl", [[ANSWER], [ANSWER] * 2], name="turns")
    with pytest.raises(
        ValueError, match=rf'{source}:1 has no field "messages" but turns .*name its field with --field'
    ):
        run([source], tmp_path / "data", tokenizer, chat=chat)
    manifest = run([source], tmp_path / "data", tokenizer, chat=chat, field="turns")
    assert (manifest.field, manifest.validation and manifest.validation.documents) == ("turns", 2)


def test_a_conversation_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    template = (
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('a person begins') }}{% endif %}" + CHAT_TEMPLATE
    )
    tokenizer = load_tokenizer(chat_folder(tmp_path / "chat", template))
    begins = [{"role": "user", "content": "Hello"}, ANSWER]
    source = write_conversations(tmp_path / "c.jsonl", [begins, [ANSWER]])
    with pytest.raises(ValueError, match=rf"{source}:2: the chat template of .*chat refuses .*: a person begins"):
        run([source], tmp_path / "data", tokenizer, chat=ChatTemplate(tmp_path / "chat"))
    assert not (tmp_path / "data").exists()
