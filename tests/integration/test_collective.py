"""Agreement between two real ranks."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from collective_ranks import agree
from launching import run_ranks


def test_errors_and_flags_of_one_rank_reach_both(tmp_path):
    run_ranks(agree, 2, logs=tmp_path)
