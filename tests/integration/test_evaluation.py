"""Check that evaluations with averaged weights leave training bitwise as it was, wherever ZeRO keeps the weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration import cases
from tests.integration.evaluation_ranks import evaluation_leaves_training_alone
from tests.support.forks import run_ranks

LAYOUTS = [
    {"zero_stage": 1},
    {"zero_stage": 3},
    pytest.param({"zero_stage": 3, "offload_optimizer": True}, marks=pytest.mark.slow),
    {"pipeline": 2},
]


@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_training_goes_on_as_if_nothing_had_been_evaluated(parallel: dict, tmp_path: Path) -> None:
    run_ranks(evaluation_leaves_training_alone, 2, cases.Layout(2, "ragged", parallel), logs=tmp_path)
