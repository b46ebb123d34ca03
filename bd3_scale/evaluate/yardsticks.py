"""What measured text is, whoever models it: how many bytes, so that models of different tokenisers compare, and the
unigram model's perplexity, which any language model must be far below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from bd3_scale.data.batch import Batch
from bd3_scale.data.tokenizer import INCOMPLETE, Tokenizer

LONGEST_CHARACTER = 4  # bytes


def counted_bytes(
    batches: Iterable[Batch], tokenizer: Tokenizer, counts: Callable[[Batch], Tensor] = lambda batch: batch.counted
) -> int:
    """Return the UTF-8 bytes of the text of the counted tokens, ends of documents apart.

    batches: sequences in the order of the split, from its first: a document that one sequence cuts goes on in the next.
    counts: bool [B, L], of a batch, the tokens whose bytes are wanted. A character whose bytes are of two tokens counts
    with the last of them; one that the last sequence cuts is left out.
    """
    eos_id = tokenizer.vocabulary.eos_id
    total = 0
    ids: list[int] = []
    flags: list[bool] = []
    for batch in batches:
        wanted, kept = counts(batch), ~batch.padding
        for row in range(len(batch.tokens)):
            tokens, counted = (values[row][kept[row]].tolist() for values in (batch.tokens, wanted))
            for token, count in zip(tokens, counted, strict=True):
                if token != eos_id:
                    ids.append(token)
                    flags.append(count)
                    continue
                total += _bytes(ids, flags, tokenizer, is_whole=True)
                ids, flags = [], []
    return total + _bytes(ids, flags, tokenizer, is_whole=False)


def _bytes(ids: Sequence[int], flags: Sequence[bool], tokenizer: Tokenizer, *, is_whole: bool) -> int:
    """Of the counted tokens of one document: each run of them by how much longer it makes the text before it."""
    total = 0
    for place, flag in enumerate([*flags, False]):
        if flag != (place > 0 and flags[place - 1]):
            whole = is_whole and place == len(ids)
            size = len(tokenizer.text_of(ids).encode("utf-8")) if whole else _complete(ids[:place], tokenizer)
            total += -size if flag else size
    return total


def _complete(ids: Sequence[int], tokenizer: Tokenizer) -> int:
    """Of the characters that are whole. Where bytes are tokens, one that is cut spoils those before it, too."""
    shorter = (ids[: max(0, len(ids) - cut)] for cut in range(LONGEST_CHARACTER))
    return max(len(tokenizer.text_of(part).rstrip(INCOMPLETE).encode("utf-8")) for part in shorter)


def unigram_perplexity(batches: Iterable[Batch], vocabulary_size: int) -> float:
    """Perplexity of the counted tokens under their own frequencies: exp of the empirical entropy in nats.

    Fitted on the very tokens it scores, so that no unigram model does better on them.

    Raises:
        ValueError: there is no counted token.
    """
    counts = torch.zeros(vocabulary_size, dtype=torch.float64)
    for batch in batches:
        counts += torch.bincount(batch.tokens[batch.counted], minlength=vocabulary_size)
    if not counts.sum():
        raise ValueError("there is no token to count: give held-out text")
    return float(torch.distributions.Categorical(probs=counts).entropy().exp())
