"""Check peak memory against an allocation of known size, in a new process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bd3_scale.observe.environment import available_bytes, peak_cuda_bytes, peak_rss_bytes


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


@pytest.mark.launch
@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_what_is_available_can_be_taken_and_no_more(limit: str) -> None:
    code = (
        "import resource\n"
        "from bd3_scale.observe.environment import available_bytes as available\n"
        f"resource.setrlimit(resource.{limit}, (1 << 30, 1 << 30))\n"
        "there = available()\n"
        "for share in (0.99, 1.01):\n"
        "    try:\n"
        "        bytearray(int(share * there))\n"
        "        print('taken')\n"
        "    except MemoryError:\n"
        "        print('refused')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.split() == ["taken", "refused"]
    assert 0 < available_bytes() < 1 << 50


def test_no_cuda_is_none_not_zero() -> None:
    import torch

    assert (peak_cuda_bytes() is None) == (not torch.cuda.is_available())
