"""Agreement between two real ranks."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from launching import run_ranks


def test_errors_and_flags_of_one_rank_reach_both():
    run_ranks(Path(__file__).with_name("collective_ranks.py"), 2, timeout=120)
