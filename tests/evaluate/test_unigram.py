"""Compare the unigram perplexity with a sum written out."""

from __future__ import annotations

import pytest
import torch

from bd3_scale.data.batch import Batch
from bd3_scale.evaluate.text_statistics import unigram_perplexity


def batch(tokens, counted):
    tokens, nothing = torch.tensor(tokens), torch.zeros(len(tokens), dtype=torch.int64)
    start, shown = torch.zeros_like(tokens).int(), torch.zeros_like(tokens).bool()
    return Batch(nothing, nothing, nothing, nothing, tokens, start, tokens, torch.tensor(counted), shown)


def test_counts_what_perplexity_counts():
    """Check counts over both batches: 1 four times, 2 twice, 3 twice give 1.5 bits, perplexity 2^1.5."""
    batches = [batch([[1, 1, 2, 3], [7, 7, 7, 7]], [[True] * 4, [False] * 4]), batch([[1, 1, 2, 3]], [[True] * 4])]
    assert unigram_perplexity(batches, 10) == pytest.approx(2**1.5)


def test_nothing_to_count():
    with pytest.raises(ValueError, match="no token to count"):
        unigram_perplexity([batch([[1]], [[False]])], 10)
