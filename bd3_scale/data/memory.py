"""Pack texts in memory into sequences for evaluation, exactly as `prepare` packs held-out texts."""

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
    """Return the samples that shards would hold of these texts, and the UTF-8 bytes of the texts."""
    tokenizer = tokenizer.checked_template()
    packer = Packer(seq_len, document_multiple, tokenizer.vocabulary.eos_id, token_dtype(tokenizer.vocabulary))
    documents = Encoder(tokenizer, seed=1)(list(texts))
    sequences = [sequence for document in documents for sequence in packer.add(document.ids, document.shown)]
    sequences += packer.fill()
    samples = [vars(sequence) for sequence in sequences if sequence.num_shown < seq_len]
    return samples, sum(document.num_bytes for document in documents)
