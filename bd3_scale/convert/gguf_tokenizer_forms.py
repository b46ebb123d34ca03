"""Recognise the tokenisers that llama.cpp implements: byte-level BPE, SentencePiece's BPE and Unigram.

Only forms are accepted for which llama.cpp was seen to make the same ids.
"""

from __future__ import annotations

from typing import Any

BYTE_LEVEL, PIECES, UNIGRAM = "gpt2", "llama", "t5"  # values of `tokenizer.ggml.model`
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Regular expression -> its name in `tokenizer.ggml.pre`, and whether words that are tokens are taken whole.
_EXPRESSIONS = {
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}": ("qwen2", False),
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}": ("llama-bpe", True),
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": ("qwen35", False),
}


def checked_family(content: dict[str, Any]) -> tuple[str, bool]:
    """Return llama.cpp's name of a tokeniser's model, and whether texts are normalised to NFC first."""
    model = content["model"]
    if model.get("type") == "Unigram":
        _check_unigram(content)
        return UNIGRAM, False
    if model.get("type") != "BPE":
        raise refusal(f"it is a {model.get('type')} tokeniser, and only BPE and Unigram are supported")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise refusal(f"its BPE has {name}={model[name]!r}")
    if model.get("byte_fallback"):
        _check_pieces(content)
        return PIECES, False
    return BYTE_LEVEL, _check_normalizer(content)


def _check_normalizer(content: dict[str, Any]) -> bool:
    """Return whether texts are normalised to NFC."""
    normalizer = content["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":
        raise refusal(f"it changes texts by {normalizer['type']} before it splits them")
    return normalizer is not None


def expression_name(content: dict[str, Any]) -> str:
    """Return llama.cpp's name of the regular expression by which byte-level BPE splits a text into words."""
    step = content["pre_tokenizer"]
    parts = step["pretokenizers"] if step and step["type"] == "Sequence" else [step]
    *splits, last = parts
    if last is None or last["type"] != "ByteLevel" or last["add_prefix_space"]:
        raise refusal("it is no byte-level BPE, or puts a space before every text")
    whole_words = bool(content["model"].get("ignore_merges"))
    if not splits and not whole_words and (last["use_regex"] or not content["model"]["merges"]):
        return "gpt-2"
    if len(splits) == 1 and splits[0]["type"] == "Split" and not last["use_regex"]:
        known = _EXPRESSIONS.get(splits[0]["pattern"].get("Regex", ""))
        if known is not None and known[1] == whole_words and splits[0]["behavior"] == "Isolated":
            return known[0]
    raise refusal("it splits texts into words by a rule that llama.cpp is not known to have")


def _check_pieces(content: dict[str, Any]) -> None:
    """Raise ValueError unless a SentencePiece tokeniser writes ▁ before a text and for each space, and has all
    bytes."""
    expected = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    normalizer = content["normalizer"] or {}
    if normalizer.get("normalizers") != expected or content["pre_tokenizer"] is not None:
        raise refusal("it is a SentencePiece BPE other than Llama 2's, which puts one ▁ before each text")
    vocabulary = content["model"]["vocab"]
    if lacking := [byte for byte in range(256) if f"<0x{byte:02X}>" not in vocabulary]:
        raise refusal(f"it lacks the bytes {lacking[:5]}")


def _check_unigram(content: dict[str, Any]) -> None:
    """Raise ValueError unless a Unigram tokeniser has the form for which llama.cpp was seen to make the same ids."""
    model, cut = content["model"], content["pre_tokenizer"] or {}
    if others := sorted(set(model) - {"type", "vocab", "unk_id", "byte_fallback"}):
        raise refusal(f"its Unigram has {', '.join(others)}")
    if model.get("byte_fallback") or model.get("unk_id") is None:
        raise refusal("its Unigram falls back to bytes or has no unknown token, which llama.cpp uses for unknown text")
    if (normalizer := content["normalizer"]) is not None:
        steps = [step["type"] for step in normalizer.get("normalizers", [normalizer])]
        raise refusal(f"its Unigram changes texts by {', '.join(steps)} before it splits them")
    if [cut.get(name) for name in ("type", "replacement", "prepend_scheme")] != ["Metaspace", "▁", "never"]:
        raise refusal("its Unigram splits texts in another way than Metaspace without a ▁ before texts")
    if not all(entry["special"] for entry in content["added_tokens"]):
        raise refusal("its Unigram has added tokens that are not special")


def refusal(reason: str) -> ValueError:
    """Return the error for a tokeniser that llama.cpp does not have, with the reason and the way out."""
    return ValueError(f"llama.cpp has no tokeniser like this model's: {reason}; use `--format bd3`, which keeps it")
