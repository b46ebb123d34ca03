"""Change a `tokenizer.json`: the template around a text, the mask's name and id, and prefixes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tokenizers  # type: ignore[import-untyped]

Json = dict[str, Any]


def template_of(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids that the template of a tokeniser puts before and after a text."""
    encoding = backend.encode("a", add_special_tokens=True)
    added = [bool(special) for special in encoding.special_tokens_mask]
    first = added.index(False) if False in added else len(added)
    last = len(added) - (added[::-1].index(False) if False in added else 0)
    return encoding.ids[:first], encoding.ids[last:]


def beginning_with(content: Json, name: str | None, token_id: int | None) -> Json:
    """Return `content` with a template that puts one token before a text (and before each of a pair), or none."""
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
    """Return `content` with the mask under a secret name and its old id, so that no text can spell it.

    If the mask is also in the model's vocabulary, it is only removed from the special tokens.
    """
    vocabulary = content["model"].get("vocab") or {}
    names = vocabulary if isinstance(vocabulary, Mapping) else {entry[0] for entry in vocabulary}
    tokens = content["added_tokens"]
    if mask in names:
        return {**content, "added_tokens": [token for token in tokens if token["content"] != mask]}
    # Added tokens are numbered by their count, so the entry must stay.
    renamed = [{**token, "content": secret} if token["content"] == mask else token for token in tokens]
    return {**content, "added_tokens": renamed}


def without_added(content: Json, token: str) -> Json:
    """Return `content` without an added token."""
    return {**content, "added_tokens": [entry for entry in content["added_tokens"] if entry["content"] != token]}


def with_mask_at(content: Json, mask: str, mask_id: int) -> Json:
    """Return `content` with the mask at a higher id, and with names for the unused ids before it.

    The library numbers added tokens by their count and reports ids without a token. So all go into the vocabulary;
    names of unused ids hold a space, which no word of a vocabulary has.
    ValueError: this kind of tokeniser cannot hold them.
    """
    model = content["model"]
    if not isinstance(model.get("vocab"), Mapping):
        raise ValueError(
            f"the tokeniser is of the kind {model.get('type')}, which numbers tokens by their position: its mask "
            "keeps its id"
        )
    added = [{**token, "id": mask_id} if token["content"] == mask else token for token in content["added_tokens"]]
    ids = {**model["vocab"], **{token["content"]: token["id"] for token in added}}
    named = set(ids.values())
    unused = {f"[unused {i}]": i for i in range(mask_id) if i not in named}
    return {**content, "added_tokens": added, "model": {**model, "vocab": {**unused, **ids}}}


def without_prefix(content: Json) -> Json:
    """Return `content` of a tokeniser that adds no prefix: neither SentencePiece's `▁` nor GPT-2's space."""
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
