"""Check that docs/observe.md names everything that a run records."""

from __future__ import annotations

import re
from pathlib import Path

from tests.observe.run_folders import evaluation_record, train_record

PAGE = Path(__file__).parents[2] / "docs/observe.md"


def test_every_metric_of_a_record_is_explained() -> None:
    explained = set(re.findall(r"`([\w/]+)`", PAGE.read_text()))
    recorded = {re.sub(r"_block_\d+$", "_block_8", name) for name in (train_record(1) | evaluation_record(1))} - {
        "step"
    }
    assert len(recorded) > 15
    assert recorded - explained == set()
