"""The unigram model's perplexity: the yardstick that any language model must be far below."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from bd3_scale.data.batch import Batch


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
