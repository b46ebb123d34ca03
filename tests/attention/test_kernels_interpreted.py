"""Check the kernels' arithmetic without a GPU, in Triton's interpreter. It needs its own process, since Triton reads
its switch once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.launch

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(600)
def test_kernels_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--hypothesis-show-statistics", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "tests/attention/interpreted_kernels.py"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    cases = sum(int(n) for n in re.findall(r"(\d+) passing", done.stdout))
    assert cases >= 60, done.stdout
