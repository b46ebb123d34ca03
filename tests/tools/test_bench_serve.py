"""Check that the server's benchmark runs on all backends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_backend_is_timed() -> None:
    command = [sys.executable, str(ROOT / "tools/bench_serve.py"), "--small", "--seconds", "1", "--clients", "1,3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()[2:]]
    backends = ("bd3_scale, fp32", "bd3_scale, bf16", "llama.cpp, q4_k_m", "AR in llama.cpp's server, q4_k_m")
    assert [row[:2] for row in rows] == [[backend, clients] for backend in backends for clients in ("1", "3")]
    assert all(float(row[2]) > 0 for row in rows)
    # One token a pass, except passes for tokens after EOS.
    assert all(1 <= float(row[5]) < 1.5 for row in rows)
    assert done.stderr.count("from the command to the first block") == 4
