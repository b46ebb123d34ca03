"""Texts in memory as sequences to measure, packed as `prepare` packs those that it holds out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from bd3_scale.data.encode import Encoder, token_dtype
from bd3_scale.data.packing import Packer
from bd3_scale.data.tokenizer import Tokenizer


def packed_texts(
    texts: Sequence[str], tokenizer: Tokenizer, *, seq_len: int, document_multiple: int
) -> tuple[list[dict[str, NDArray[Any]]], int]:
    """Return the samples that shards would hold of these documents, and the UTF-8 bytes of their text."""
    tokenizer = tokenizer.checked_template()
    packer = Packer(seq_len, document_multiple, tokenizer.vocabulary.eos_id, token_dtype(tokenizer.vocabulary))
    documents = Encoder(tokenizer, seed=1)(list(texts))
    found = [sequence for document in documents for sequence in packer.add(document.ids, document.shown)]
    found += packer.fill()
    samples = [vars(sequence) for sequence in found if sequence.num_shown < seq_len]
    return samples, sum(document.num_bytes for document in documents)
