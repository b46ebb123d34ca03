"""Check bf16 on two ranks: fp32 masters, and micro-batch gradients that are added in fp32, at every ZeRO stage."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.precision_ranks import bf16_accumulates_in_fp32
from tests.support.forks import run_ranks

LAYOUTS = [
    {"zero_stage": 0},
    {"zero_stage": 1},
    {"zero_stage": 2},
    {"zero_stage": 3},
    {"zero_stage": 2, "offload_optimizer": True},
    {"pipeline": 2},
    {"tensor": 2, "sequence": True},
]


@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_bf16_keeps_masters_and_adds_up_in_fp32(parallel: dict, tmp_path: Path) -> None:
    run_ranks(bf16_accumulates_in_fp32, 2, parallel, logs=tmp_path)
