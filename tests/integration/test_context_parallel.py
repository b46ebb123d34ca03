"""Check that context parallelism moves only clean keys and values, half of what both streams would be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integration import cases
from tests.integration.context_ranks import count_bytes
from tests.support.forks import run_ranks


@pytest.mark.parametrize("case", ["packed", "mdlm", "two-copies"])
def test_one_stream_of_keys_and_values_is_gathered(case: str, tmp_path: Path) -> None:
    """Check that MDLM, without a clean stream, gathers its noisy one, and that further noisy copies move nothing."""
    run_ranks(count_bytes, 2, case, tmp_path / "bytes.pt", logs=tmp_path)
    found = torch.load(tmp_path / "bytes.pt")
    model = cases.CASES[case].model
    keys_and_values = 2 * cases.LENGTH * model.query_groups * model.head_size * 4
    assert found == {
        "forward": {"_allgather_base_": model.num_layers * keys_and_values},
        "backward": {"_reduce_scatter_base_": model.num_layers * keys_and_values},
    }
