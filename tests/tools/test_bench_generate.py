"""Check that the sampler's benchmark runs, and compares it with a reference that does the same work."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from tools.bench_generate import BLOCK, Twin, random_model

ROOT = Path(__file__).parents[2]


def test_batches_and_the_twin_are_timed_in_one_run():
    command = [sys.executable, str(ROOT / "tools/bench_generate.py"), "--tokens", "31", "--repeats", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["tokens_per_second"]
    assert list(found) == ["batch 1", "batch 8", "plain twin", "plain twin without a cache"]
    assert all(value > 1 for value in found.values())


def test_the_twin_computes_what_the_model_does():
    with ExitStack() as stack, torch.no_grad():
        model = random_model(stack, "small").eval()
        twins = Twin(model), Twin(model, cached=False)
        cache = model.new_cache(1, 3 * BLOCK)
        text = torch.randint(256, (3 * BLOCK,), generator=torch.Generator().manual_seed(0))
        for start in range(0, len(text), BLOCK):
            block, positions = text[start : start + BLOCK], torch.arange(start, start + BLOCK)
            logits = model.decode(block[None], positions[None], cache)[0]
            torch.testing.assert_close(twins[0].forward(block, start), logits, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(twins[1].forward(text[: start + BLOCK], 0)[start:], logits, rtol=1e-4, atol=1e-4)
            cache.commit([BLOCK])


def test_the_twin_writes_whole_blocks():
    with ExitStack() as stack:
        tokens = Twin(random_model(stack, "small")).write(2 * BLOCK)
    assert len(tokens) == 2 * BLOCK
    assert tokens[0] == 0
    assert (tokens < 257).all()


@pytest.mark.slow
def test_tokens_that_are_no_whole_blocks_are_refused():
    refused = subprocess.run(
        [sys.executable, str(ROOT / "tools/bench_generate.py"), "--tokens", "32"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert refused.returncode == 2
    assert "--tokens is 32: give whole blocks of 16 less the prompt's token, such as 31" in refused.stderr
