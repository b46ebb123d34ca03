"""Write a tokeniser as keys of a GGUF file, if llama.cpp makes the same ids of a text; other tokenisers are refused.

llama.cpp implements byte-level BPE, whose regular expression for words it knows by a name; SentencePiece's BPE by
scores, of which the highest is merged first; and SentencePiece's Unigram, which takes the pieces with the highest sum
of scores. `check_ids` compares many texts. Besides llama.cpp's keys a file holds the tokeniser's files, which this
package reads.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from bd3_scale.convert.gguf_tokenizer_forms import BYTE_LEVEL, PIECES, UNIGRAM, checked_family, expression_name, refusal
from bd3_scale.data.chat import chat_template
from bd3_scale.data.tokenizer import TOKENIZER_FILES, Tokenizer
from bd3_scale.generate import llama_cpp
from bd3_scale.generate.llama_file import TEMPLATE, TOKENIZER_CONFIG, TOKENIZER_JSON
from bd3_scale.resilience.files import read_object

# Values of `llama_token_type` in llama.h.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

# Score of unused rows in Unigram: llama.cpp would find their names in texts; with this score it prefers anything else.
_LEAST_SCORE = -1e30


@dataclass(frozen=True)
class TokenizerKeys:
    """The keys of a tokeniser, by the types that llama.cpp reads.

    composed: texts are normalised to Unicode's NFC first, which llama.cpp leaves to its caller.
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
    """Return the keys of a tokeniser whose files lie in `folder`, for a model with `rows` rows.

    ValueError: llama.cpp has no such tokeniser.
    """
    content, config = (read_object(folder / name) for name in TOKENIZER_FILES)
    model = content["model"]
    family, composed = checked_family(content)
    tokens, types = _tokens(content, family, rows)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", [])]
    vocabulary = tokenizer.vocabulary
    numbers = {"eos": vocabulary.eos_id, "padding": vocabulary.eos_id, "mask": vocabulary.mask_id}
    numbers |= {} if vocabulary.bos_id is None else {"bos": vocabulary.bos_id}
    flags = {"add_bos_token": vocabulary.bos_id is not None, "add_eos_token": False}
    flags |= {"add_space_prefix": family == PIECES}
    strings = {"tokenizer.ggml.model": family, TOKENIZER_JSON: _text(content), TOKENIZER_CONFIG: _text(config)}
    scores = None
    if family == BYTE_LEVEL:
        strings["tokenizer.ggml.pre"] = expression_name(content)
    elif family == PIECES:
        scores = _scores(tokens, merges)
    else:
        scores = [float(score) for _, score in model["vocab"]] + [_LEAST_SCORE] * (rows - len(model["vocab"]))
        numbers |= {"unknown": model["unk_id"]}
        flags |= {"remove_extra_whitespaces": False}
    template = chat_template(folder)
    return TokenizerKeys(
        strings if template is None else {**strings, TEMPLATE: template},
        {f"tokenizer.ggml.{name}_token_id": number for name, number in numbers.items()},
        {f"tokenizer.ggml.{name}": flag for name, flag in flags.items()},
        tokens,
        types,
        # A tokeniser of single bytes has no merges, but llama.cpp refuses an empty list: this merge can never apply.
        (merges or [" ".join([tokens[vocabulary.eos_id]] * 2)]) if family == BYTE_LEVEL else None,
        scores,
        composed,
    )


def _tokens(content: dict[str, Any], family: str, rows: int) -> tuple[list[str], list[int]]:
    """Return the token of each row, and its type."""
    vocab = content["model"]["vocab"]
    entries = vocab.items() if isinstance(vocab, Mapping) else ((piece, row) for row, (piece, _) in enumerate(vocab))
    names = {row: name for name, row in entries}
    added = {entry["id"]: entry for entry in content["added_tokens"]}
    tokens, types = [], []
    for number in range(rows):
        token, kind = names.get(number, f"[PAD{number}]"), _NORMAL if number in names else _UNUSED
        if number in added:
            token, kind = added[number]["content"], _CONTROL if added[number]["special"] else _USER_DEFINED
        elif family == PIECES and token.startswith("<0x") and len(token) == 6:
            kind = _BYTE
        tokens.append(token)
        types.append(kind)
    if family == PIECES and content["model"].get("unk_token") in vocab:
        types[vocab[content["model"]["unk_token"]]] = _UNKNOWN
    if family == UNIGRAM:
        # The tokenizers library finds the unknown token's name in texts; llama.cpp has its id under a key instead.
        types[content["model"]["unk_id"]] = _NORMAL
        if len(set(tokens)) < len(tokens) or "" in tokens:
            raise refusal("it has a piece twice, or an empty one")
    return tokens, types


def check_ids(opened: llama_cpp.Model, tokenizer: Tokenizer, keys: TokenizerKeys) -> int:
    """Compare llama.cpp's ids of many texts with the tokeniser's, and return the number of texts.

    If texts are normalised to NFC, those that NFC changes are left out.
    ValueError: the ids of a text differ.
    """
    texts = [text for text in sample_texts() if not keys.composed or unicodedata.is_normalized("NFC", text)]
    if keys.strings["tokenizer.ggml.model"] == UNIGRAM:
        texts += _repetitions(keys.tokens)
    for text, expected in zip(texts, tokenizer.encode_batch(texts), strict=True):
        if (ids := opened.tokenize(text)) != expected:
            raise refusal(f"it tokenises {text!r} as {expected[:12]}, and llama.cpp as {ids[:12]}")
    return len(texts)


def _repetitions(tokens: list[str]) -> Iterator[str]:
    """Yield repetitions of each token's name, and of each letter up to 40 times.

    Unigram finds any token's name in a text, also a special token's. Different segmentations of a repetition add up the
    same scores in another order, so rounding decides; a file has scores in float32, a tokeniser perhaps in float64.
    """
    for token in tokens:
        yield from (token * times for times in (range(1, 41) if len(token) == 1 else (1, 2, 3, 7)))


def sample_texts(count: int = 3000) -> Iterator[str]:
    """Yield random texts of a fixed seed, in many scripts, with spaces, line ends, digits and contractions."""
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


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Return a score per token: the earlier its first merge, the higher; tokens that are never merged have the
    least."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault(pair.replace(" ", ""), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False)
