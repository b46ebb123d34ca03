"""Check that a model whose matrices are split over ranks decodes as one process does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integration.decoding_ranks import RANKS, decode
from tests.support.forks import run_ranks

SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in ("moe", "moe-sigmoid")]


@pytest.mark.parametrize("case", ["ragged", "official", "tied", *SLOW])
def test_tensor_parallel_ranks_decode_as_one_process(case: str, tmp_path: Path) -> None:
    """Check SwiGLU with grouped heads; biases, of which the last is added once; tied embeddings with another
    activation; and experts chosen with biases.
    """
    run_ranks(decode, RANKS, case, tmp_path / "logits.pt", logs=tmp_path)
    found = torch.load(tmp_path / "logits.pt")
    for name, expected in found["one"].items():
        allowed = expected.isfinite()
        assert allowed.sum() > 0.4 * allowed.numel(), name
        assert torch.equal(found["ranks"][name].isfinite(), allowed), name
        difference = (found["ranks"][name] - expected)[allowed].abs().max()
        assert difference < 1e-5 * expected[allowed].abs().max(), (name, difference)
