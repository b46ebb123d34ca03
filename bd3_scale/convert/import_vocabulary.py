"""Combine the ids of an imported model from its tokeniser, its configuration and the command line."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from bd3_scale.data.tokenizer import Tokenizer, load_tokenizer
from bd3_scale.recipe.vocabulary import Vocabulary

BERT_CLS, BERT_SIZE = 101, 30522  # [CLS] and size of bert-base-uncased, the vocabulary of LM1B models


def vocabulary_of(
    tokenizer: str | None,
    mask_token: str | None,
    rows: int,
    eos_id: int | None,
    mask_id: int | None,
    num_token_ids: int | None = None,
    *,
    bos: bool | None = None,
) -> tuple[Vocabulary, Tokenizer | None]:
    """Return the vocabulary on which tokeniser, model and mask agree, and the tokeniser, if there is one.

    Args:
        tokenizer, mask_token, bos: see `plan_import`.
        rows: rows of the model's embedding.
        eos_id, mask_id: those of the model; None if it has none.
        num_token_ids: number of ids in use, if the embedding has more rows.

    Raises:
        ValueError: they do not agree, or one of them is unknown.
    """
    if tokenizer is None:
        if mask_token is not None:
            raise ValueError(f"mask_token={mask_token!r} names a token, and there is no tokeniser: give --tokenizer")
        if mask_id is None:
            raise ValueError(
                "there is no tokenizer.json next to the weights, and the mask needs an id: give --tokenizer"
            )
        if eos_id is None:
            raise ValueError("there is no tokenizer.json next to the weights: give --tokenizer, or --eos-id")
        return _checked(size=num_token_ids or rows, eos_id=eos_id, mask_id=mask_id, rows=rows), None
    loaded = load_tokenizer(tokenizer, mask_token)
    loaded = loaded.checked_template() if bos is None else loaded.with_bos_switch(bos)
    own = loaded.vocabulary
    # A mask token that was added to the tokeniser has its last id, which may be one behind the embedding's last row.
    text_ids = own.size - (own.mask_id == own.size - 1)
    if text_ids > rows:
        raise ValueError(
            f"the tokeniser {tokenizer} has ids up to {text_ids - 1}, and the embedding has {rows} rows: give the "
            "tokeniser that the model was trained with, with --tokenizer"
        )
    if mask_id is not None and own.mask_id != mask_id:
        taken = loaded.name_of(mask_id)
        conflict = f"that id is its token {taken!r}" if taken is not None else f"its mask has the id {own.mask_id}"
        raise ValueError(
            f"the model's mask has the id {mask_id}, and in the tokeniser {tokenizer} {conflict}: give the model's "
            "tokeniser with --tokenizer, or name its mask with --mask-token"
        )
    return _checked(**own.model_dump(exclude={"rows"}), rows=rows), loaded


def as_official(vocabulary: Vocabulary, tokenizer: Tokenizer | None) -> tuple[Vocabulary, Tokenizer | None]:
    """Return both with the BOS that the official bd3lms code puts before every sequence.

    That is the tokeniser's BOS if it declares one; else `[CLS]` for BERT's uncased vocabulary, and EOS for others,
    which is both for GPT-2.
    """
    declared = None if tokenizer is None else tokenizer.declared_bos_id
    known = BERT_CLS if vocabulary.rows == BERT_SIZE else vocabulary.eos_id
    bos_id = known if declared is None else declared
    return (
        vocabulary.model_copy(update={"bos_id": bos_id}),
        None if tokenizer is None else tokenizer.with_bos(bos_id),
    )


def _checked(**ids: Any) -> Vocabulary:
    try:
        return Vocabulary(**ids)
    except ValidationError as error:
        raise ValueError("; ".join(p["msg"].removeprefix("Value error, ") for p in error.errors())) from error
