"""Check that llama.cpp's benchmark runs, and compares types with our own sampler in one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_types_are_timed_beside_ours() -> None:
    command = [sys.executable, str(ROOT / "tools/bench_gguf.py"), "--small", "--types", "q8_0,q4_0", "--blocks", "4,8"]
    done = subprocess.run([*command, "--repeats", "2"], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()[2:]]
    assert [row[:2] for row in rows] == [
        [size, name] for size in ("4", "8") for name in ("bd3_scale, fp32", "bd3_scale, bf16", "q8_0", "q4_0")
    ]
    sizes = {"bd3_scale, fp32": 1.0, "bd3_scale, bf16": 0.5, "q8_0": 0.269, "q4_0": 0.15}
    assert {row[1]: float(row[4]) for row in rows} == sizes
    assert all(float(row[2]) > 0 for row in rows)


@pytest.mark.slow
def test_what_cannot_be_measured_is_refused() -> None:
    command = [sys.executable, str(ROOT / "tools/bench_gguf.py"), "--quality"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2
    assert "--quality measures a trained model" in done.stderr
