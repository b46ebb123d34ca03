"""Peak memory against an allocation of known size, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bd3_scale.observe.environment import peak_cuda_bytes, peak_rss_bytes


@pytest.mark.launch
def test_peak_holds_what_was_freed_and_nothing_of_the_parent() -> None:
    code = (
        "from bd3_scale.observe.environment import peak_rss_bytes as peak\n"
        "before = peak()\n"
        "data = bytearray(b'x') * 200_000_000\n"
        "del data\n"
        "print(before, peak())"
    )
    ballast = bytearray(b"x") * 300_000_000
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    before, after = map(int, run.stdout.split())
    assert before < 100e6
    assert 195e6 < after - before < 250e6
    assert peak_rss_bytes() > len(ballast)


def test_no_cuda_is_none_not_zero() -> None:
    import torch

    assert (peak_cuda_bytes() is None) == (not torch.cuda.is_available())
