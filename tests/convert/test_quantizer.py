"""Round to nearest and GPTQ against closed forms, exact enumeration and the least-squares solution."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_scale.convert.quantizer import HessianSum, QuantizedWeight, Scheme, gptq, output_error, round_to_nearest

INT4, INT8 = Scheme(4, 32), Scheme(8, 32)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(rows: int, features: int, seed: int = 1) -> torch.Tensor:
    """Inputs of a few strong directions, as activations are."""
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
    # The scale's own rounding moves the ends of the range by a share of it.
    half_step = found.scales.float().repeat_interleave(32, 1) * (0.5 + (0.01 if dtype == torch.float32 else 0.55))
    exact = found.values.float() * found.scales.float().repeat_interleave(32, 1)
    assert ((exact - weight).abs() <= half_step).all()


def test_a_quantised_weight_is_quantised_to_itself() -> None:
    """The largest magnitude of a group at the lowest level, −8 or −128, makes the scale again."""
    weight = random(4, 64)
    weight[:, ::32] = -weight.abs().amax(1, keepdim=True) * 2
    first = round_to_nearest(weight, INT8, torch.float32)
    again = round_to_nearest(first.dequantize(), INT8, torch.float32)
    assert (first.values - again.values).abs().max() <= 1
    assert (first.dequantize() - again.dequantize()).abs().max() <= first.scales.max()


def test_zeros_and_tiny_groups_have_a_scale() -> None:
    for weight in (torch.zeros(2, 32), torch.full((2, 32), 1e-44)):
        found = round_to_nearest(weight, INT4, torch.bfloat16)
        assert (found.scales > 0).all()
        assert found.dequantize().abs().max() < 1e-37


def test_features_without_correlation_are_rounded_to_nearest() -> None:
    """Of a diagonal Hessian nothing can be made up for."""
    weight = random(8, 96)
    hessian = torch.diag(torch.rand(96, generator=torch.Generator().manual_seed(2)) + 0.1)
    nearest, found = round_to_nearest(weight, INT4, torch.float32), gptq(weight, hessian, INT4, torch.float32)
    assert torch.equal(found.values, nearest.values)
    assert torch.equal(found.scales, nearest.scales)


def test_a_features_that_is_never_met_is_rounded_to_nearest_and_disturbs_nothing() -> None:
    rows, weight = correlated(200, 64), random(4, 64)
    rows[:, [3, 40]] = 0
    found = gptq(weight, hessian_of(rows), INT4, torch.float32)
    assert torch.isfinite(found.scales).all()
    scales = found.scales.repeat_interleave(32, 1)
    expected = (weight / scales).round().clamp(-8, 7)
    assert torch.equal(found.values[:, [3, 40]].float(), expected[:, [3, 40]])


def naive(weight: torch.Tensor, hessian: torch.Tensor, scheme: Scheme, damping: float) -> torch.Tensor:
    """Column by column: after each, all others that are left are solved for by least squares on the damped inputs."""
    damped = hessian.double() + damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    target, rest = weight.double(), weight.double().clone()
    fixed = torch.zeros_like(target)
    scales = torch.zeros(len(weight), weight.shape[1] // scheme.group_size, dtype=torch.float64)
    for column in range(weight.shape[1]):
        group, within = divmod(column, scheme.group_size)
        if within == 0:
            columns = rest[:, column : column + scheme.group_size]
            scales[:, group] = columns.abs().amax(1).float().double() / ((scheme.highest - scheme.lowest) / 2)
        level = (rest[:, column] / scales[:, group]).round().clamp(scheme.lowest, scheme.highest)
        fixed[:, column] = level * scales[:, group]
        left = slice(column + 1, None)
        # Minimise (target − fixed − rest) H (…)ᵀ over the columns that are left.
        error = (target - fixed)[:, : column + 1]
        rest[:, left] = (
            target[:, left] + torch.linalg.solve(damped[left, left], (error @ damped[: column + 1, left]).T).T
        )
    return fixed


def test_gptq_is_the_least_squares_solution_column_by_column() -> None:
    rows, weight = correlated(300, 64), random(6, 64)
    hessian = hessian_of(rows)
    found = gptq(weight, hessian, INT4, torch.float32, damping=0.01).dequantize()
    expected = naive(weight, hessian, INT4, 0.01).float()
    # In fp32 a weight between two levels may fall to the other one, after which the rest of its row differs.
    same_rows = ((found - expected).abs() < 1e-4).all(1)
    assert same_rows.sum() >= 5
    assert output_error(weight, gptq(weight, hessian, INT4, torch.float32), hessian) == pytest.approx(
        float((((weight - expected) @ hessian) * (weight - expected)).sum() / ((weight @ hessian) * weight).sum()),
        rel=0.1,
    )


def test_no_rounding_of_three_columns_beats_the_best_and_gptq_is_near() -> None:
    scheme = Scheme(4, 3)
    best_errors, own_errors, nearest_errors = [], [], []
    for seed in range(20):
        rows, weight = random(50, 3, seed=seed) @ random(3, 3, seed=seed + 100), random(1, 3, seed=seed + 200)
        hessian = hessian_of(rows)
        found = gptq(weight, hessian, scheme, torch.float32, damping=1e-6)
        best = min(
            output_error(weight, QuantizedWeight(torch.tensor([levels], dtype=torch.int8), found.scales), hessian)
            for levels in itertools.product(range(-8, 8), repeat=3)
        )
        best_errors.append(best)
        own_errors.append(output_error(weight, found, hessian))
        nearest_errors.append(output_error(weight, round_to_nearest(weight, scheme, torch.float32), hessian))
    assert all(own >= best - 1e-9 for own, best in zip(own_errors, best_errors, strict=True))
    # Greedy, it may lose on a single weight; over many it lies between the best and rounding to nearest.
    assert sum(best_errors) < sum(own_errors) < sum(nearest_errors)


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
