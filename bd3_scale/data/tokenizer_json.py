"""Changes of a `tokenizer.json`: what its template adds to a text, whether the mask can be spelt, what it prepends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tokenizers  # type: ignore[import-untyped]

Json = dict[str, Any]


def template_of(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids that the template of a tokeniser puts before and behind a text."""
    found = backend.encode("a", add_special_tokens=True)
    added = [bool(special) for special in found.special_tokens_mask]
    first = added.index(False) if False in added else len(added)
    last = len(added) - (added[::-1].index(False) if False in added else 0)
    return found.ids[:first], found.ids[last:]


def beginning_with(content: Json, name: str | None, token_id: int | None) -> Json:
    """Return `content` of a tokeniser that puts one token before a text, and before each of a pair, or none."""
    if name is None:
        return {**content, "post_processor": None}
    special = {"SpecialToken": {"id": name, "type_id": 0}}
    text, second = ({"Sequence": {"id": letter, "type_id": 0}} for letter in "AB")
    template = {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [special, text, special, second],
        "special_tokens": {name: {"id": name, "ids": [token_id], "tokens": [name]}},
    }
    return {**content, "post_processor": template}


def without_mask(content: Json, mask: str, secret: str) -> Json:
    """Return `content` of a tokeniser whose mask has its id still, and a name that nobody knows.

    A mask that is an entry of the model's vocabulary, too, only ceases to be a special token.
    """
    vocabulary = content["model"].get("vocab") or {}
    names = vocabulary if isinstance(vocabulary, Mapping) else {entry[0] for entry in vocabulary}
    tokens = content["added_tokens"]
    if mask in names:
        return {**content, "added_tokens": [token for token in tokens if token["content"] != mask]}
    # Ids of added tokens follow from their number: the entry stays.
    renamed = [{**token, "content": secret} if token["content"] == mask else token for token in tokens]
    return {**content, "added_tokens": renamed}


def without_added(content: Json, token: str) -> Json:
    """Return `content` of a tokeniser without an added token."""
    return {**content, "added_tokens": [entry for entry in content["added_tokens"] if entry["content"] != token]}


def with_mask_at(content: Json, mask: str, mask_id: int) -> Json:
    """Return `content` of a tokeniser whose mask has another id, behind all others, and names for the ids before it.

    The library numbers added tokens by their count, and tells of ids without a token: all are in the vocabulary, with a
    space in the names that stand for nothing, which no word has.
    ValueError: the kind of tokeniser has no place for them.
    """
    model = content["model"]
    if not isinstance(model.get("vocab"), Mapping):
        raise ValueError(
            f"the tokeniser is of the kind {model.get('type')}, whose tokens are numbered by their place: its mask "
            "keeps its id"
        )
    added = [{**token, "id": mask_id} if token["content"] == mask else token for token in content["added_tokens"]]
    ids = {**model["vocab"], **{token["content"]: token["id"] for token in added}}
    named = set(ids.values())
    unused = {f"[unused {i}]": i for i in range(mask_id) if i not in named}
    return {**content, "added_tokens": added, "model": {**model, "vocab": {**unused, **ids}}}


def without_prefix(content: Json) -> Json:
    """Return `content` of a tokeniser that puts nothing before a text: no SentencePiece `▁`, no space as GPT-2's."""
    return {
        **content,
        "normalizer": _without_prefix(content["normalizer"], "normalizers"),
        "pre_tokenizer": _without_prefix(content["pre_tokenizer"], "pretokenizers"),
    }


def _without_prefix(step: Json | None, parts: str) -> Json | None:
    if step is None or step["type"] == "Prepend":
        return None
    if step["type"] == "Sequence":
        kept = [_without_prefix(part, parts) for part in step[parts]]
        return {**step, parts: [part for part in kept if part is not None]}
    if step["type"] == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    return {**step, "add_prefix_space": False} if "add_prefix_space" in step else step
