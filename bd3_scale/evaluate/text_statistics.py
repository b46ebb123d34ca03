"""Compute figures of a text that do not depend on the model: its bytes and its unigram perplexity.

Bytes make models with different tokenisers comparable. Any language model must be far below the unigram perplexity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from bd3_scale.data.batch import Batch
from bd3_scale.data.tokenizer import INCOMPLETE, Tokenizer

LONGEST_CHARACTER_BYTES = 4  # of UTF-8 (RFC 3629)


def counted_bytes(
    batches: Iterable[Batch], tokenizer: Tokenizer, counts: Callable[[Batch], Tensor] = lambda batch: batch.counted
) -> int:
    """Return the UTF-8 bytes of the text of the counted tokens, without the tokens that end documents.

    A character whose bytes belong to two tokens counts with the last of them; a character that the last sequence cuts
    is left out.

    Args:
        batches: sequences in the order of the split, from its first: a document that one sequence cuts continues in the
            next.
        counts: returns, for a batch, the tokens whose bytes are counted, bool [B, L].
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
    """Return the bytes of the counted tokens of one document.

    Tokens are no strings: what a token decodes to depends on those before it. So a run of counted tokens has the length
    by which it makes the text before it longer.
    """
    total = 0
    for index, flag in enumerate([*flags, False]):
        if flag != (index > 0 and flags[index - 1]):
            whole = is_whole and index == len(ids)
            size = len(tokenizer.text_of(ids).encode("utf-8")) if whole else _complete(ids[:index], tokenizer)
            total += -size if flag else size
    return total


def _complete(ids: Sequence[int], tokenizer: Tokenizer) -> int:
    """Return the bytes of the complete characters of a text that may end inside one.

    Decoders replace an incomplete character by U+FFFD; some of them then replace the bytes before it, too. The longest
    result over the cuts of up to three bytes is the right one.
    """
    shorter = (ids[: max(0, len(ids) - cut)] for cut in range(LONGEST_CHARACTER_BYTES))
    return max(len(tokenizer.text_of(part).rstrip(INCOMPLETE).encode("utf-8")) for part in shorter)


def unigram_perplexity(batches: Iterable[Batch], vocabulary_size: int) -> float:
    """Return the perplexity of the counted tokens under their own frequencies: exp of the empirical entropy in nats.

    The model is fitted to the tokens that it scores, so no unigram model is better on them.

    Raises:
        ValueError: there is no counted token.
    """
    counts = torch.zeros(vocabulary_size, dtype=torch.float64)
    for batch in batches:
        counts += torch.bincount(batch.tokens[batch.counted], minlength=vocabulary_size)
    if not counts.sum():
        raise ValueError("there is no token to count: give held-out text")
    return float(torch.distributions.Categorical(probs=counts).entropy().exp())
