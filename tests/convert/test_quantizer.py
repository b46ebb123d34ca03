"""Compare round to nearest and GPTQ with closed forms, exact enumeration and the least-squares solution."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_scale.convert import quantizer
from bd3_scale.convert.quantizer import HessianSum, QuantizedWeight, Scheme, gptq, output_error, round_to_nearest

INT4, INT8 = Scheme(4, 32), Scheme(8, 32)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(rows: int, features: int, seed: int = 1) -> torch.Tensor:
    """Return inputs with a few strong directions, as activations have."""
    directions = random(features // 4, features, seed=seed)
    return random(rows, features // 4, seed=seed + 1) @ directions + 0.1 * random(rows, features, seed=seed + 2)


def hessian_of(rows: torch.Tensor) -> torch.Tensor:
    total = HessianSum(rows.shape[1])
    total.add(rows)
    return total.hessian


@given(st.sampled_from([INT4, INT8]), st.integers(0, 999), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(deadline=None, max_examples=40)
def test_rounding_is_the_nearest_multiple_of_the_stored_scale(scheme: Scheme, seed: int, dtype: torch.dtype) -> None:
    weight = random(3, 64, seed=seed) * 10.0 ** (seed % 5 - 2)
    found = round_to_nearest(weight, scheme, dtype)
    assert found.scales.dtype == dtype
    assert found.scales.shape == (3, 2)
    assert found.values.min() >= scheme.lowest
    assert found.values.max() <= scheme.highest
    levels = torch.arange(scheme.lowest, scheme.highest + 1).float()
    for row, column in itertools.product(range(3), range(0, 64, 7)):
        candidates = levels * found.scales[row, column // 32].float()
        nearest = (candidates - weight[row, column]).abs().min()
        chosen = (found.values[row, column] * found.scales[row, column // 32].float() - weight[row, column]).abs()
        assert chosen <= nearest + 1e-6 * weight.abs().max()
    # Only clipped weights differ from their level by more than half a step.
    steps = found.scales.float().repeat_interleave(32, 1)
    inside = (found.values > scheme.lowest) & (found.values < scheme.highest)
    assert ((found.values * steps - weight).abs() <= 0.5001 * steps)[inside].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", [INT4, INT8])
def test_a_quantised_weight_falls_on_its_own_levels(scheme: Scheme, dtype: torch.dtype) -> None:
    found = round_to_nearest(random(4, 64), scheme, dtype)
    levels = found.dequantize().float() / found.scales.float().repeat_interleave(32, 1)
    assert found.dequantize().dtype == dtype
    assert torch.equal(levels.round(), found.values.float())


def squared_error(weight: torch.Tensor, found: QuantizedWeight) -> float:
    return float((found.dequantize().float() - weight).square().sum())


def test_clipping_never_costs_and_pays_in_four_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random(64, 256)
    clipped = {scheme: round_to_nearest(weight, scheme, torch.bfloat16) for scheme in (Scheme(4), Scheme(8))}
    monkeypatch.setattr(quantizer, "CLIPPING", (1.0,))
    widest = {scheme: round_to_nearest(weight, scheme, torch.bfloat16) for scheme in clipped}
    for scheme, found in clipped.items():
        for row in range(64):
            one, other = (
                QuantizedWeight(w.values[row : row + 1], w.scales[row : row + 1]) for w in (found, widest[scheme])
            )
            assert squared_error(weight[row], one) <= squared_error(weight[row], other)
    assert squared_error(weight, clipped[Scheme(4)]) < 0.95 * squared_error(weight, widest[Scheme(4)])


def test_small_weights_are_as_precise_in_float16_as_in_float32() -> None:
    """Check scales that are below the least normal number of float16."""
    weight = random(8, 64) * 1e-3
    narrow, wide = (round_to_nearest(weight, INT8, dtype) for dtype in (torch.float16, torch.float32))
    assert narrow.scales.max() < torch.finfo(torch.float16).tiny
    assert squared_error(weight, narrow) < 1.1 * squared_error(weight, wide)


def test_zeros_and_tiny_groups_have_a_scale() -> None:
    for weight in (torch.zeros(2, 32), torch.full((2, 32), 1e-44)):
        found = round_to_nearest(weight, INT4, torch.bfloat16)
        assert (found.scales > 0).all()
        assert found.dequantize().abs().max() < 1e-37


def test_features_without_correlation_are_rounded_to_nearest() -> None:
    """Check that GPTQ with a diagonal Hessian compensates nothing and equals rounding to nearest."""
    weight = random(8, 96)
    hessian = torch.diag(torch.rand(96, generator=torch.Generator().manual_seed(2)) + 0.1)
    nearest, found = round_to_nearest(weight, INT4, torch.float32), gptq(weight, hessian, INT4, torch.float32)
    assert torch.equal(found.values, nearest.values)
    assert torch.equal(found.scales, nearest.scales)


def test_a_feature_that_is_never_met_is_rounded_to_nearest_and_disturbs_nothing() -> None:
    rows, weight = correlated(200, 64), random(4, 64)
    rows[:, [3, 40]] = 0
    found = gptq(weight, hessian_of(rows), INT4, torch.float32)
    assert torch.isfinite(found.scales).all()
    scales = found.scales.repeat_interleave(32, 1)
    expected = (weight / scales).round().clamp(-8, 7)
    assert torch.equal(found.values[:, [3, 40]].float(), expected[:, [3, 40]])


def test_a_weight_whose_inputs_are_all_zero_is_rounded_to_nearest() -> None:
    weight, nothing = random(4, 64), torch.zeros(64, 64)
    found = gptq(weight, nothing, INT4, torch.float32)
    assert torch.equal(found.values, round_to_nearest(weight, INT4, torch.float32).values)
    assert output_error(weight, found, nothing) == 0


def naive(
    weight: torch.Tensor, hessian: torch.Tensor, scales: torch.Tensor, scheme: Scheme, damping: float
) -> torch.Tensor:
    """Quantise column by column, the largest inputs first; after each, solve for all remaining columns by least squares
    on the damped inputs.
    """
    damped = hessian.double() + damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    target, fixed, rest = weight.double(), torch.zeros_like(weight).double(), weight.double().clone()
    order = sorted(range(len(hessian)), key=lambda column: -float(hessian[column, column]))
    for index, column in enumerate(order):
        scale = scales[:, column // scheme.group_size].double()
        fixed[:, column] = (rest[:, column] / scale).round().clamp(scheme.lowest, scheme.highest) * scale
        done, left = order[: index + 1], order[index + 1 :]
        # Minimise (target − fixed − rest) H (…)ᵀ over the columns that are left.
        pull = (target - fixed)[:, done] @ damped[done][:, left]
        rest[:, left] = target[:, left] + torch.linalg.solve(damped[left][:, left], pull.T).T
    return fixed


@pytest.mark.parametrize("block", [16, 48, 128])
def test_blocks_do_not_change_what_gptq_finds(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, weight = correlated(300, 96).round(), random(6, 96)
    expected = gptq(weight, hessian_of(rows), INT4, torch.float32)
    monkeypatch.setattr(quantizer, "BLOCK", block)
    found = gptq(weight, hessian_of(rows), INT4, torch.float32)
    assert (found.values == expected.values).all(1).sum() >= 5


def test_gptq_makes_up_for_the_rounding_of_products() -> None:
    """Check 8 bits and bfloat16, where the rounding of products is as large as the rounding to a level."""
    rows, weight = correlated(1000, 128), random(64, 128)
    hessian = hessian_of(rows)
    exact, product = (output_error(weight, gptq(weight, hessian, Scheme(8), dtype), hessian)
                      for dtype in (torch.float32, torch.bfloat16))  # fmt: skip
    assert product < 1.2 * exact


def test_gptq_is_the_least_squares_solution_column_by_column() -> None:
    rows, weight = correlated(300, 64), random(6, 64)
    hessian = hessian_of(rows)
    quantised = gptq(weight, hessian, INT4, torch.float32, damping=0.01)
    assert torch.equal(quantised.scales, round_to_nearest(weight, INT4, torch.float32).scales)
    found, expected = quantised.dequantize(), naive(weight, hessian, quantised.scales, INT4, 0.01).float()
    # In fp32, a weight between two levels may be rounded to the other one, and then the rest of its row differs.
    same_rows = ((found - expected).abs() < 1e-4).all(1)
    assert same_rows.sum() >= 5
    assert output_error(weight, quantised, hessian) == pytest.approx(
        float((((weight - expected) @ hessian) * (weight - expected)).sum() / ((weight @ hessian) * weight).sum()),
        rel=0.1,
    )


def test_no_rounding_of_three_columns_beats_the_best_and_gptq_is_near() -> None:
    scheme = Scheme(4, 3)
    levels = torch.tensor(list(itertools.product(range(-8, 8), repeat=3)))
    cases = []
    for seed in range(200):
        rows, weight = random(50, 3, seed=seed) @ random(3, 3, seed=seed + 1000), random(1, 3, seed=seed + 2000)
        hessian = hessian_of(rows)
        nearest = round_to_nearest(weight, scheme, torch.float32)
        found = gptq(weight, hessian, scheme, torch.float32, damping=1e-6)
        all_errors = ((levels * found.scales - weight) @ rows.T).square().sum(1) / (weight @ rows.T).square().sum()
        cases.append([float(all_errors.min()), *(output_error(weight, q, hessian) for q in (found, nearest))])
    best, own, near = torch.tensor(cases).T
    assert (own >= 0.999 * best).all()
    assert (own <= 1.001 * best).float().mean() > 0.6
    # GPTQ is greedy and may lose on a single weight; a few ill-conditioned ones would dominate a sum.
    assert (own <= 1.001 * near).float().mean() > 0.9
    assert best.log().mean() < own.log().mean() < near.log().mean() - 0.2


def test_gptq_loses_less_than_rounding_where_inputs_are_correlated() -> None:
    rows, weight = correlated(1000, 256), random(64, 256)
    hessian = hessian_of(rows)
    scheme = Scheme(4, 128)
    nearest = output_error(weight, round_to_nearest(weight, scheme, torch.bfloat16), hessian)
    found = output_error(weight, gptq(weight, hessian, scheme, torch.bfloat16), hessian)
    assert found < 0.5 * nearest
    errors = weight - gptq(weight, hessian, scheme, torch.bfloat16).dequantize().float()
    assert float((rows @ errors.T).square().sum() / (rows @ weight.T).square().sum()) == pytest.approx(found, rel=1e-3)


def test_groups_must_divide_the_features() -> None:
    for quantise in (lambda: round_to_nearest(random(2, 48), INT4, torch.float32),
                     lambda: gptq(random(2, 48), torch.eye(48), INT4, torch.float32)):  # fmt: skip
        with pytest.raises(ValueError, match="48 input features do not divide into groups of 32"):
            quantise()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    weight, hessian = random(2, 32), torch.eye(32)
    broken = weight.clone()
    broken[1, 3] = bad
    for quantise in (lambda: round_to_nearest(broken, INT4, torch.float32),
                     lambda: gptq(broken, hessian, INT4, torch.float32)):  # fmt: skip
        with pytest.raises(ValueError, match="a weight is not finite"):
            quantise()
    hessian[0, 0] = bad
    with pytest.raises(ValueError, match="the calibration inputs are not finite"):
        gptq(weight, hessian, INT4, torch.float32)
