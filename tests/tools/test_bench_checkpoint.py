from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "tools" / "bench_checkpoint.py"


@pytest.mark.slow
def test_it_measures_what_a_checkpoint_costs(tmp_path: Path) -> None:
    sizes = ["--layers", "2", "--hidden", "32", "--saves", "1", "--out", "table.md"]
    command = [sys.executable, PROGRAM, *sizes]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "table.md").read_text()
    assert "two data-parallel processes" in table
    assert re.search(r"\| training waits for its start \| \d+\.\d{3} s \(at most \d+\.\d{3}\) \|", table)
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]
