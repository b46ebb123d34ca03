"""The benchmark of the sampler runs, and compares it with a twin that does the same work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from tools.bench_generate import BLOCK, Twin

ROOT = Path(__file__).parents[2]


def test_batches_and_the_twin_are_timed_in_one_run():
    command = [sys.executable, str(ROOT / "tools/bench_generate.py"), "--tokens", "31", "--repeats", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["tokens_per_second"]
    assert list(found) == ["batch 1", "batch 8", "plain twin"]
    assert all(value > 1 for value in found.values())


def test_the_twin_sees_its_cache():
    """What a block becomes depends on the keys of the blocks before it, and on nothing behind."""
    twin = Twin()
    block = torch.randn(BLOCK, 256, generator=torch.Generator().manual_seed(0))
    alone = twin.forward(block, 0)
    twin.forward(block * 2, 16)
    assert torch.equal(twin.forward(block, 0), alone)
    assert not torch.equal(twin.forward(block, 16), alone)
    refused = subprocess.run(
        [sys.executable, str(ROOT / "tools/bench_generate.py"), "--tokens", "32"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert refused.returncode == 2
    assert "--tokens is 32: give whole blocks of 16 less the prompt's token, such as 31" in refused.stderr
