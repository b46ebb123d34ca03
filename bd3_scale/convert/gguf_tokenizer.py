"""A tokeniser as keys of a GGUF file, where llama.cpp makes the same ids of a text; others are refused.

llama.cpp knows byte-level BPE by the name of a regular expression that cuts text into words, and SentencePiece's BPE by
scores, of which the highest is merged first. `check_ids` has it encode many texts. Beside its own keys a file holds
the tokeniser's files whole, which this package reads.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from bd3_scale.data.chat import chat_template
from bd3_scale.data.tokenizer import TOKENIZER_FILES, Tokenizer
from bd3_scale.generate import llama_cpp
from bd3_scale.generate.llama_file import TEMPLATE, TOKENIZER_CONFIG, TOKENIZER_JSON
from bd3_scale.resilience.files import read_object

# Types of tokens, as llama.h numbers them.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# What `tokenizer.ggml.pre` calls the expressions of other tokenisers, and whether it takes whole words that are tokens.
_EXPRESSIONS = {
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}": ("qwen2", False),
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}": ("llama-bpe", True),
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": ("qwen35", False),
}


@dataclass(frozen=True)
class TokenizerKeys:
    """Hold what a file says of its tokeniser: values by their keys, in the types that llama.cpp reads.

    composed: texts are put into Unicode's NFC first, which llama.cpp leaves to its caller.
    """

    strings: Mapping[str, str]
    numbers: Mapping[str, int]
    flags: Mapping[str, bool]
    tokens: list[str]
    types: list[int]
    merges: list[str] | None
    scores: list[float] | None
    composed: bool


def tokenizer_keys(tokenizer: Tokenizer, folder: Path, rows: int) -> TokenizerKeys:
    """Return the keys of a tokeniser whose files lie in `folder`, of a model with so many rows.

    ValueError: llama.cpp has no such tokeniser.
    """
    content, config = (read_object(folder / name) for name in TOKENIZER_FILES)
    model = content["model"]
    if model.get("type") != "BPE":
        raise _refusal(f"it is of the kind {model.get('type')}, and byte-level and SentencePiece BPE alone are written")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise _refusal(f"its BPE has {name}={model[name]!r}")
    pieces = bool(model.get("byte_fallback"))
    family, composed = ("llama", False) if pieces else ("gpt2", _check_normalizer(content))
    if pieces:
        _check_pieces(content)
    names = {number: name for name, number in model["vocab"].items()}
    added = {entry["id"]: entry for entry in content["added_tokens"]}
    tokens, types = [], []
    for number in range(rows):
        token, kind = names.get(number, f"[PAD{number}]"), _NORMAL if number in names else _UNUSED
        if number in added:
            token, kind = added[number]["content"], _CONTROL if added[number]["special"] else _USER_DEFINED
        elif pieces and token.startswith("<0x") and len(token) == 6:
            kind = _BYTE
        tokens.append(token)
        types.append(kind)
    if pieces and model.get("unk_token") in model["vocab"]:
        types[model["vocab"][model["unk_token"]]] = _UNKNOWN
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    vocabulary = tokenizer.vocabulary
    numbers = {"eos": vocabulary.eos_id, "padding": vocabulary.eos_id, "mask": vocabulary.mask_id}
    numbers |= {} if vocabulary.bos_id is None else {"bos": vocabulary.bos_id}
    flags = {"add_bos_token": vocabulary.bos_id is not None, "add_eos_token": False, "add_space_prefix": pieces}
    strings = {"tokenizer.ggml.model": family, TOKENIZER_JSON: _text(content), TOKENIZER_CONFIG: _text(config)}
    strings |= {} if pieces else {"tokenizer.ggml.pre": _expression(content)}
    template = chat_template(folder)
    return TokenizerKeys(
        strings if template is None else {**strings, TEMPLATE: template},
        {f"tokenizer.ggml.{name}_token_id": number for name, number in numbers.items()},
        {f"tokenizer.ggml.{name}": flag for name, flag in flags.items()},
        tokens,
        types,
        # Bytes have none, and a list without an entry is no list there: symbols of several letters never come to this.
        None if pieces else merges or [" ".join([tokens[vocabulary.eos_id]] * 2)],
        _scores(tokens, merges) if pieces else None,
        composed,
    )


def check_ids(opened: llama_cpp.Model, tokenizer: Tokenizer, *, composed: bool) -> int:
    """Compare the ids of many texts in llama.cpp and here, and return how many texts these were.

    composed: see `TokenizerKeys`; texts that NFC changes are then left out.
    ValueError: a text has others.
    """
    texts = [text for text in sample_texts() if not composed or unicodedata.is_normalized("NFC", text)]
    for text, expected in zip(texts, tokenizer.encode_batch(texts), strict=True):
        if (found := opened.tokenize(text)) != expected:
            raise _refusal(f"of {text!r} it makes {expected[:12]}, and llama.cpp {found[:12]}")
    return len(texts)


def sample_texts(count: int = 3000) -> Iterator[str]:
    """Yield texts, always the same, of many scripts, with spaces, lines, digits and contractions between."""
    random = Random(0)
    scripts = [(0x20, 0x7F), (0x20, 0x7F), (0xA0, 0x250), (0x370, 0x530), (0x5D0, 0x5EB), (0x620, 0x650)]
    scripts += [(0x900, 0x980), (0xE00, 0xE5C), (0x3040, 0x3100), (0x4E00, 0x9FB0), (0xAC00, 0xD7A4), (0x300, 0x340)]
    scripts += [(0x2000, 0x2070), (0x1F300, 0x1F650)]
    pieces = [
        "'s",
        "'LL",
        "'t",
        " don't",
        "12",
        "3.14159",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "  ",
        "    ",
        " ",
        "½",
        "…",
        "—",
    ]
    pieces += ["<|endoftext|>", "[MASK]", "a\u0301", "\u200d", "http://x.y/z?q=1", "def f(x):\n\treturn x**2"]
    for _ in range(count):
        parts = []
        for _ in range(random.randint(1, 8)):
            low, high = random.choice(scripts)
            word = "".join(chr(random.randrange(low, high)) for _ in range(random.randint(1, 6)))
            parts += [random.choice(["", " "]), random.choice([word, random.choice(pieces)])]
        yield "".join(parts)


def _check_normalizer(content: dict[str, Any]) -> bool:
    """Return whether texts are put into NFC."""
    normalizer = content["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":
        raise _refusal(f"it changes texts by {normalizer['type']} before it cuts them")
    return normalizer is not None


def _expression(content: dict[str, Any]) -> str:
    """Return what llama.cpp calls the way in which byte-level BPE cuts words."""
    step = content["pre_tokenizer"]
    parts = step["pretokenizers"] if step and step["type"] == "Sequence" else [step]
    *splits, last = parts
    if last is None or last["type"] != "ByteLevel" or last["add_prefix_space"]:
        raise _refusal("it is no byte-level BPE, or puts a space before every text")
    whole_words = bool(content["model"].get("ignore_merges"))
    if not splits and not whole_words and (last["use_regex"] or not content["model"]["merges"]):
        return "gpt-2"
    if len(splits) == 1 and splits[0]["type"] == "Split" and not last["use_regex"]:
        known = _EXPRESSIONS.get(splits[0]["pattern"].get("Regex", ""))
        if known is not None and known[1] == whole_words and splits[0]["behavior"] == "Isolated":
            return known[0]
    raise _refusal("it cuts texts into words in a way that is not known to be one of llama.cpp's")


def _check_pieces(content: dict[str, Any]) -> None:
    """Raise ValueError unless a SentencePiece tokeniser puts ▁ before a text and for each space, and has all bytes."""
    expected = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    normalizer = content["normalizer"] or {}
    if normalizer.get("normalizers") != expected or content["pre_tokenizer"] is not None:
        raise _refusal("it is SentencePiece BPE of another kind than Llama 2's, with one ▁ before each text")
    vocabulary = content["model"]["vocab"]
    if lacking := [byte for byte in range(256) if f"<0x{byte:02X}>" not in vocabulary]:
        raise _refusal(f"it lacks the bytes {lacking[:5]}")


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Return a score a token, the higher the earlier its first merge; what is never merged has the least."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault(pair.replace(" ", ""), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False)


def _refusal(reason: str) -> ValueError:
    return ValueError(f"llama.cpp has no tokeniser like this model's: {reason}; `--format bd3` writes it as it is")
