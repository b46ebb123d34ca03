"""Test that replicas which diverge are found and named, and that only shared values are compared."""

from __future__ import annotations

import pytest
import torch

from bd3_scale.parallel.replicas import fingerprint
from tests.faults.divergence_ranks import LAYOUTS, drift
from tests.support.forks import run_ranks


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_rank_and_the_parameter_are_named(name, tmp_path):
    run_ranks(drift, LAYOUTS[name][0], name, logs=tmp_path, timeout=120)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_one_bit_of_one_element_changes_the_fingerprint(dtype):
    tensor = torch.randn(5_000_000, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = fingerprint(tensor)
    bits = tensor.view(torch.int32 if dtype == torch.float32 else torch.int16)
    width = 8 * bits.element_size()
    seen = {int(before)}
    for place in (0, 1, 4_194_303, 4_194_304, 4_999_999):
        for bit in range(width):
            kept = bits[place].clone()
            bits[place] ^= -(1 << (width - 1)) if bit == width - 1 else 1 << bit
            seen.add(int(fingerprint(tensor)))
            bits[place] = kept
    assert len(seen) == 1 + 5 * width
    assert int(fingerprint(tensor)) == int(before)
    swapped = tensor.clone()
    swapped[[0, 1]] = tensor[[1, 0]]
    assert int(fingerprint(swapped)) != int(before)
