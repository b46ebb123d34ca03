"""Test that batches of a pipeline's first stage reach its later ones, in real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.pipeline_ranks import STAGES, end_with_an_error, leave, share
from tests.support.forks import run_ranks

pytestmark = pytest.mark.slow


def test_every_stage_has_what_the_first_one_reads(tmp_path: Path) -> None:
    run_ranks(share, STAGES, logs=tmp_path)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_stage_that_goes_is_told_in_one_line(rank: int, tmp_path: Path) -> None:
    run_ranks(leave, STAGES, rank, logs=tmp_path)


def test_a_first_stage_that_ends_is_understood_before(tmp_path: Path) -> None:
    run_ranks(end_with_an_error, STAGES, logs=tmp_path)
