from __future__ import annotations

import pytest

from tools.bench_order import COST, DOWNLOADS, main


def test_it_prints_both_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--shards", "2000", "--replayed", "512", "--window", "16384"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    cost, downloads = rows[1:7], rows[8:]
    assert (rows[0], rows[7]) == (list(COST), list(DOWNLOADS))
    assert [row[1] for row in cost] == ["1", "1", "8", "8", "64", "64"]
    assert len(downloads) == 9
    assert all(1 <= float(row[-1]) < 1.25 for row in downloads)
