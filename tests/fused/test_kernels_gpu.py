"""Check the kernels on a GPU: every case of the property tests, sizes of a model, reproducibility."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fused.cases import (
    Case,
    Logits,
    cases,
    check_case,
    check_logits,
    heads_case,
    large_cases,
    logits_case,
    logits_cases,
    norm_case,
    outputs_and_gradients,
    swiglu_case,
)

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
# Relative to a result's norm: one rounding of the inputs' precision, and the rounding of sums.
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 2e-6}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@settings(max_examples=100)
@given(cases(widest=5000), st.sampled_from(list(TOLERANCE)))
def test_any_case(case: Case, dtype: torch.dtype) -> None:
    check_case(case, dtype, TOLERANCE[dtype], "cuda")


@settings(max_examples=50)
@given(logits_cases(widest=20_000), st.sampled_from(list(TOLERANCE)))
def test_any_logits(case: Logits, dtype: torch.dtype) -> None:
    check_logits(case, dtype, max(TOLERANCE[dtype], 1e-4), "cuda")


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_sizes_of_a_model(dtype: torch.dtype) -> None:
    for case in (*large_cases((400, 2)), norm_case((9, 2), 16_384, generator())):
        check_case(case, dtype, TOLERANCE[dtype], "cuda")
    check_logits(logits_case(64, 152_064, generator()), dtype, max(TOLERANCE[dtype], 1e-4), "cuda")


def test_gradients_of_weights_are_bitwise_reproducible() -> None:
    for case in (norm_case((4096, 2), 2048, generator()), heads_case((2048, 2), 4, 4, 128, True, generator())):
        first = outputs_and_gradients(case, torch.bfloat16, "cuda")
        for _ in range(20):
            again = outputs_and_gradients(case, torch.bfloat16, "cuda")
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_rows_beyond_two_to_the_31_numbers() -> None:
    """Check offsets that 32 bits do not hold: the last rows of each result are compared."""
    from bd3_scale.fused.cross_entropy import logit_gradient_
    from bd3_scale.fused.swiglu import swiglu

    x = torch.randn(70_000, 32_000, device="cuda", dtype=torch.bfloat16)
    torch.testing.assert_close(swiglu(x)[-3:], swiglu(x[-3:].clone()), rtol=0, atol=0)
    rows = torch.zeros(3, len(x), device="cuda")
    targets = torch.zeros(len(x), device="cuda", dtype=torch.int64)
    forbidden = torch.zeros(x.shape[1], device="cuda", dtype=torch.bool)
    want = logit_gradient_(x[-3:].clone(), targets[-3:], 0, forbidden, *(rows[:, -3:] + 1))
    torch.testing.assert_close(logit_gradient_(x, targets, 0, forbidden, *(rows + 1))[-3:], want, rtol=0, atol=0)


def exercise_every_kernel() -> None:
    """Run sizes that fill no tile; `compute-sanitizer` checks this."""
    ragged = generator()
    for case in (
        swiglu_case((7, 3), 1100, ragged),
        norm_case((70, 3), 300, ragged),
        norm_case((5, 1), 5000, ragged),
        heads_case((50, 3), 3, 3, 80, True, ragged),
        heads_case((50, 3), 3, 0, 128, False, ragged),
    ):
        check_case(case, torch.bfloat16, TOLERANCE[torch.bfloat16], "cuda")
    check_logits(logits_case(7, 5001, ragged), torch.bfloat16, TOLERANCE[torch.bfloat16], "cuda")
    torch.cuda.synchronize()
