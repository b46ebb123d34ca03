"""Check that two real ranks agree."""

from __future__ import annotations

from tests.integration.collective_ranks import agree
from tests.support.forks import run_ranks


def test_errors_and_flags_of_one_rank_reach_both(tmp_path):
    run_ranks(agree, 2, logs=tmp_path)
