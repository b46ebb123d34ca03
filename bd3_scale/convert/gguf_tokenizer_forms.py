"""Name the tokenisers that llama.cpp has: byte-level BPE, SentencePiece's BPE and Unigram, in forms seen to agree."""

from __future__ import annotations

from typing import Any

BYTE_LEVEL, PIECES, UNIGRAM = "gpt2", "llama", "t5"  # as `tokenizer.ggml.model` has them
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


def checked_family(content: dict[str, Any]) -> tuple[str, bool]:
    """Return what llama.cpp calls the model of a tokeniser, and whether texts are put into NFC first."""
    model = content["model"]
    if model.get("type") == "Unigram":
        _check_unigram(content)
        return UNIGRAM, False
    if model.get("type") != "BPE":
        raise refusal(f"it is of the kind {model.get('type')}, and BPE and Unigram alone are written")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise refusal(f"its BPE has {name}={model[name]!r}")
    if model.get("byte_fallback"):
        _check_pieces(content)
        return PIECES, False
    return BYTE_LEVEL, _check_normalizer(content)


def _check_normalizer(content: dict[str, Any]) -> bool:
    """Return whether texts are put into NFC."""
    normalizer = content["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":
        raise refusal(f"it changes texts by {normalizer['type']} before it cuts them")
    return normalizer is not None


def expression_name(content: dict[str, Any]) -> str:
    """Return what llama.cpp calls the way in which byte-level BPE cuts words."""
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
    raise refusal("it cuts texts into words in a way that is not known to be one of llama.cpp's")


def _check_pieces(content: dict[str, Any]) -> None:
    """Raise ValueError unless a SentencePiece tokeniser puts ▁ before a text and for each space, and has all bytes."""
    expected = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    normalizer = content["normalizer"] or {}
    if normalizer.get("normalizers") != expected or content["pre_tokenizer"] is not None:
        raise refusal("it is SentencePiece BPE of another kind than Llama 2's, with one ▁ before each text")
    vocabulary = content["model"]["vocab"]
    if lacking := [byte for byte in range(256) if f"<0x{byte:02X}>" not in vocabulary]:
        raise refusal(f"it lacks the bytes {lacking[:5]}")


def _check_unigram(content: dict[str, Any]) -> None:
    """Raise ValueError unless a Unigram tokeniser has the one form of which llama.cpp was seen to make the same ids."""
    model, cut = content["model"], content["pre_tokenizer"] or {}
    if others := sorted(set(model) - {"type", "vocab", "unk_id", "byte_fallback"}):
        raise refusal(f"its Unigram has {', '.join(others)}")
    if model.get("byte_fallback") or model.get("unk_id") is None:
        raise refusal("its Unigram has bytes or nothing for what has no piece, and llama.cpp the unknown token")
    if (normalizer := content["normalizer"]) is not None:
        steps = [step["type"] for step in normalizer.get("normalizers", [normalizer])]
        raise refusal(f"its Unigram changes texts by {', '.join(steps)} before it cuts them")
    if [cut.get(name) for name in ("type", "replacement", "prepend_scheme")] != ["Metaspace", "▁", "never"]:
        raise refusal("its Unigram cuts texts in another way than Metaspace without a ▁ before texts")
    if not all(entry["special"] for entry in content["added_tokens"]):
        raise refusal("its Unigram has added tokens that are not special")


def refusal(reason: str) -> ValueError:
    """Return the error that says why a tokeniser is not written, and the way out."""
    return ValueError(f"llama.cpp has no tokeniser like this model's: {reason}; `--format bd3` writes it as it is")
