"""Compare the plain versions of the fused functions, and their gradients, with formulas in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from bd3_scale.fused import parts
from bd3_scale.fused.heads import qkv_heads, qkv_heads_, rotate
from bd3_scale.fused.norm import add_rms_norm
from bd3_scale.fused.swiglu import swiglu
from tests.fused.cases import (
    Case,
    Logits,
    cases,
    check_case,
    check_logits,
    kept,
    large_cases,
    logits_case,
    logits_cases,
    places,
    single_norm_case,
)

# Relative to a result's norm: the rounding of one number and of sums of a few hundred.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 8e-3}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@settings(max_examples=60)
@given(cases())
def test_any_case(case: Case) -> None:
    for dtype, tolerance in TOLERANCE.items():
        check_case(case, dtype, tolerance)


@pytest.mark.parametrize("case", [*large_cases(), single_norm_case((7, 3), 100, generator())], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_sizes_of_a_model(case: Case, dtype: torch.dtype) -> None:
    check_case(case, dtype, TOLERANCE[dtype])


@settings(max_examples=30)
@given(logits_cases())
def test_any_logits(case: Logits) -> None:
    check_logits(case, torch.float32, 1e-4)
    check_logits(case, torch.bfloat16, 4e-3)


@pytest.mark.parametrize("cached", [1, 500, 1300])
def test_logits_pass_in_parts_of_rows(monkeypatch: pytest.MonkeyPatch, cached: int) -> None:
    """Check parts of one row, a single part, and several parts of which the last is shorter."""
    monkeypatch.setattr(parts, "CACHED", cached)
    check_logits(logits_case(7, 300, generator()), torch.float32, 1e-4)


def test_only_inputs_and_one_number_a_row_are_kept() -> None:
    x, more = torch.randn(2, 5, 3, 64, requires_grad=True).unbind()
    weight = torch.randn(64, requires_grad=True)
    assert kept(lambda: swiglu(x)) == places(x)
    outputs: list[Tensor] = []
    of_norm = kept(lambda: outputs.extend(add_rms_norm(x, more, weight, 1e-5)))
    (numbers,) = of_norm - places(outputs[0], weight)
    assert numbers not in places(x, more, outputs[1])


def test_without_gradients_it_is_the_same() -> None:
    x, more, weight = torch.randn(5, 3, 32), torch.randn(5, 3, 32), torch.randn(32)
    cos, sin = torch.randn(2, 5, 3, 8)
    runs: list[Callable[[Tensor], object]] = [
        swiglu,
        lambda x: add_rms_norm(x, more, weight, 1e-5),
        lambda x: add_rms_norm(x, None, weight, 1e-5),
        lambda x: qkv_heads(x, 2, weight[:8], weight[8:16], cos, sin, 1e-5),
    ]
    for run in runs:
        torch.testing.assert_close(run(x), run(x.clone().requires_grad_()), rtol=0, atol=0)


def test_an_output_that_nothing_reads_has_no_gradient() -> None:
    x, more = torch.randn(2, 3, 16, dtype=torch.float64).unbind()
    leaves = [x.requires_grad_(), more.requires_grad_(), torch.ones(16, dtype=torch.float64, requires_grad=True)]
    total, normed = add_rms_norm(*leaves, 1e-5)
    of_total = torch.autograd.grad(total.sum(), leaves, allow_unused=True, retain_graph=True)
    assert of_total[2] is None
    assert all(torch.equal(grad, torch.ones_like(x)) for grad in of_total[:2])
    of_normed = torch.autograd.grad(normed.square().sum(), leaves)
    plain = torch.nn.functional.rms_norm(x + more, (16,), leaves[2], 1e-5)
    torch.testing.assert_close(of_normed, torch.autograd.grad(plain.square().sum(), leaves))


def test_a_rotation_by_positions_depends_on_their_difference_alone() -> None:
    """Check equation 16 of Su et al., 2021."""
    angle = torch.tensor([[3.0], [7.0], [13.0], [17.0]]) / 10 ** torch.arange(4)
    cos, sin = angle.cos().repeat(1, 2), torch.cat([-angle.sin(), angle.sin()], -1)
    query, key = torch.randn(2, 8)
    turned_query, turned_key = rotate(query.expand(4, 8), cos, sin), rotate(key.expand(4, 8), cos, sin)
    torch.testing.assert_close(turned_query[0] @ turned_key[1], turned_query[2] @ turned_key[3])


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("num_queries", [1, 3])
def test_heads_of_a_decoded_block_are_those_of_training(num_queries: int, normed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(5, 2, 2 * (num_queries + 2) * 8, generator=generator)
    rotary = torch.randn(2, 5, 2, 8, generator=generator)
    weights = torch.randn(2, 8, generator=generator) if normed else (None, None)
    want = qkv_heads(qkv, num_queries, *weights, rotary[0], rotary[1], 1e-5)
    weight = torch.cat([weights[0].expand(num_queries, -1), weights[1][None]]) if normed else None
    for mine, theirs in zip(qkv_heads_(qkv.clone(), num_queries, weight, rotary, 1e-5), want, strict=True):
        torch.testing.assert_close(mine, theirs)
