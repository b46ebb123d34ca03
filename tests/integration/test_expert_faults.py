"""Check that all ranks skip a step when one rank's expert has a gradient that is not finite, at every ZeRO stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integration.expert_ranks import skips
from tests.support.forks import run_ranks

EP2 = {"expert": 2}
# Ranks and layouts: experts on one rank, on two, and on the last stage.
LAYOUTS = [
    (2, {**EP2, "zero_stage": 0}),
    (2, {**EP2, "zero_stage": 1}),
    (2, {**EP2, "zero_stage": 2}),
    (4, {**EP2, "zero_stage": 0}),
    (4, {**EP2, "zero_stage": 1}),
    (4, {**EP2, "zero_stage": 2}),
    (4, {**EP2, "tensor": 2, "sequence": True}),
    (4, {**EP2, "pipeline": 2, "virtual_pipeline": 2}),
]
FAST = LAYOUTS[0]


@pytest.mark.parametrize(
    ("ranks", "parallel", "precision"),
    [
        pytest.param(*layout, dtype, marks=() if layout == FAST and dtype == torch.bfloat16 else pytest.mark.slow)
        for layout in LAYOUTS
        for dtype in (torch.float32, torch.bfloat16)
    ],
)
def test_all_ranks_leave_out_a_step_whose_nan_one_of_them_has(
    ranks: int, parallel: dict, precision: torch.dtype, tmp_path: Path
) -> None:
    run_ranks(skips, ranks, ranks, parallel, precision, logs=tmp_path)
