"""How many bytes of text the measured tokens are, so that models of different tokenisers compare."""

from __future__ import annotations

from collections.abc import Iterable

from bd3_scale.data.batch import Batch
from bd3_scale.data.tokenizer import Tokenizer


def counted_bytes(batches: Iterable[Batch], tokenizer: Tokenizer) -> int:
    """Return the UTF-8 bytes of the text of the counted tokens, ends of documents apart.

    batches: sequences in the order of the split, from its first: a document that one sequence cuts goes on in the next.
    Of a document that the last one cuts within a character, that character is left out.
    """
    eos_id = tokenizer.vocabulary.eos_id
    total = 0
    ids: list[int] = []
    counts: list[bool] = []
    for batch in batches:
        kept = ~batch.padding
        for row in range(len(batch.tokens)):
            tokens, counted = (values[row][kept[row]].tolist() for values in (batch.tokens, batch.counted))
            for token, count in zip(tokens, counted, strict=True):
                if token != eos_id:
                    ids.append(token)
                    counts.append(count)
                    continue
                total += _bytes(ids, counts, tokenizer)
                ids, counts = [], []
    return total + _bytes(ids, counts, tokenizer, cut=True)


def _bytes(ids: list[int], counts: list[bool], tokenizer: Tokenizer, *, cut: bool = False) -> int:
    """Of the counted tokens of one document, each run of them by what it adds to the text before it."""
    total = 0
    for end in range(1, len(ids) + 1):
        if counts[end - 1] and (end == len(ids) or not counts[end]):
            start = end - 1
            while start and counts[start - 1]:
                start -= 1
            final = not (cut and end == len(ids))
            total += len(tokenizer.continuation(ids[:start], ids[start:end], final=final).encode("utf-8"))
    return total
