"""Weights in 4 or 8 bits: round to nearest, and GPTQ (Frantar et al., ICLR 2023), on plain tensors.

Legend: O output features (rows of a weight), I input features (columns), G groups of columns that share a scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

BLOCK = 128  # columns after which GPTQ makes up for their errors in all that are still to come
CLIPPING = (1.0, 0.95, 0.9, 0.85, 0.8)
SMALLEST_SCALE = 2.0**-24  # the least that float16 holds
# Rows for each input feature, below which a Hessian is more chance than inputs: where features are not correlated, GPTQ
# calibrated on as many rows as features loses 2.7 times what rounding does on other rows, on four times as many 1.1.
LEAST_ROWS = 4
# A mean square is a number of its own for each feature: the least rows of which weights by it were never worse than
# none at all by more than 1 %, whatever the tails of the inputs.
LEAST_ROWS_OF_SQUARES = 64


@dataclass(frozen=True)
class Scheme:
    """Symmetric integers of `bits`, with one scale for every `group_size` input features of an output feature."""

    bits: Literal[4, 8]
    group_size: int = 128

    @property
    def lowest(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        return (1 << (self.bits - 1)) - 1


@dataclass(frozen=True)
class QuantizedWeight:
    """values: int8 [O, I]; scales: [O, G], in the type in which they are stored."""

    values: Tensor
    scales: Tensor

    def dequantize(self) -> Tensor:
        """Return [O, I] in the type of the scales: what an engine multiplies with."""
        group_size = self.values.shape[1] // self.scales.shape[1]
        return _multiply(self.values.unflatten(1, (-1, group_size)), self.scales[..., None]).flatten(1)


class HessianSum:
    """Σ x xᵀ over the rows x that a weight is multiplied with, fp32 [I, I]: half the Hessian of its squared output
    error in each of its rows. rows: how many these are.
    """

    def __init__(self, features: int, device: torch.device | None = None) -> None:
        self.rows = 0
        self.hessian = torch.zeros(features, features, device=device)

    def add(self, rows: Tensor) -> None:
        """Add rows [N, I]."""
        self.rows += len(rows)
        rows = rows.float()
        self.hessian.addmm_(rows.t(), rows)

    @property
    def is_enough(self) -> bool:
        """Say whether GPTQ gains by it."""
        return self.rows >= LEAST_ROWS * len(self.hessian)


class SquareSum:
    """Σ x² over the rows x that a weight is multiplied with, fp32 [I]: the diagonal of `HessianSum`."""

    def __init__(self, features: int, device: torch.device | None = None) -> None:
        self.rows = 0
        self.squares = torch.zeros(features, device=device)

    def add(self, rows: Tensor) -> None:
        """Add rows [N, I]."""
        self.rows += len(rows)
        self.squares += rows.float().square().sum(0)

    @property
    def is_enough(self) -> bool:
        """Say whether weighing by it gains something."""
        return self.rows >= LEAST_ROWS_OF_SQUARES


def round_to_nearest(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> QuantizedWeight:
    """Put each weight [O, I] at the nearest multiple of its group's scale.

    ValueError: the input features do not divide into groups, or a weight is not finite.
    """
    _check(weight, scheme)
    grouped = weight.float().unflatten(1, (-1, scheme.group_size))
    scales = _scales(grouped, scheme, scale_dtype)
    return QuantizedWeight(_round(grouped, scales[..., None], scheme).flatten(1), scales)


def gptq(
    weight: Tensor, hessian: Tensor, scheme: Scheme, scale_dtype: torch.dtype, damping: float = 0.01
) -> QuantizedWeight:
    """Put column after column at the nearest multiple, its error made up for by the columns that are still to come.

    The error of a column is spread as the closed form of optimal brain surgeon says, by the inverse of `hessian`
    [I, I] among the columns to come, which its Cholesky factor holds (paper, section 3.3). The columns with the largest
    inputs come first. Scales are those of `round_to_nearest`, so that every column keeps its place and its group, as
    engines read them.

    Args:
        damping: share of the mean diagonal that is added to the diagonal, so that it can be inverted. A feature that
            was never met has no part in the error, and is rounded to nearest.

    ValueError: the input features do not divide into groups, or a weight or the Hessian is not finite.
    """
    _check(weight, scheme)
    if not hessian.isfinite().all():
        raise ValueError("the calibration inputs are not finite: is the checkpoint sound, and is float32 wide enough?")
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(hessian[order][:, order], damping)
    scales = _scales(weight.float().unflatten(1, (-1, scheme.group_size)), scheme, scale_dtype)
    # Transposed, a column of the weight is contiguous.
    rest = weight.float().t()[order]
    steps = scales.t()[order // scheme.group_size]
    values = torch.empty(rest.shape, dtype=torch.int8, device=weight.device)
    for start in range(0, len(rest), BLOCK):
        here = slice(start, start + BLOCK)
        columns, corner = rest[here], factor[here, here]
        errors = torch.empty_like(columns)
        for i in range(len(columns)):
            level = _round(columns[i], steps[start + i], scheme)
            values[start + i] = level
            errors[i] = (columns[i] - _multiply(level, steps[start + i]).float()) / corner[i, i]
            columns[i + 1 :].addr_(corner[i, i + 1 :], errors[i], alpha=-1)
        rest[start + BLOCK :].addmm_(factor[here, start + BLOCK :].t(), errors, alpha=-1)
    return QuantizedWeight(values[order.argsort()].t().contiguous(), scales)


def output_error(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> float:
    """Return ‖(W − Ŵ)X‖² / ‖WX‖² over the rows X of `hessian`; 0 where nothing comes out."""
    weight, hessian = weight.double(), hessian.double()
    difference = weight - quantized.dequantize().double()
    whole = float(((weight @ hessian) * weight).sum())
    return float(((difference @ hessian) * difference).sum()) / whole if whole else 0.0


def _check(weight: Tensor, scheme: Scheme) -> None:
    if weight.shape[1] % scheme.group_size:
        raise ValueError(
            f"{weight.shape[1]} input features do not divide into groups of {scheme.group_size}: take a group size "
            "that divides them"
        )
    if not weight.isfinite().all():
        raise ValueError("a weight is not finite, and no integer stands for it: quantise a checkpoint that is sound")


def _scales(grouped: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """Return the scales of groups [..., size].

    At the widest the largest magnitude is in the middle of the last step, as in compressed-tensors; clipping a few
    weights may cost less than coarse steps for all. The least squared error wins.
    """
    widest = grouped.abs().amax(-1) / ((scheme.highest - scheme.lowest) / 2)
    # A group of zeros needs a scale all the same, and one that the type can hold.
    candidates = [(widest * share).clamp(min=SMALLEST_SCALE).to(dtype) for share in CLIPPING]
    errors = torch.stack([_squared_error(grouped, scales[..., None], scheme) for scales in candidates])
    return torch.stack(candidates).gather(0, errors.argmin(0, keepdim=True))[0]


def _squared_error(grouped: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:
    rounded = _multiply(_round(grouped, scales, scheme), scales)
    return (rounded.float() - grouped).square().sum(-1)


def _round(weights: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:
    return (weights / scales.float()).round().clamp(scheme.lowest, scheme.highest).to(torch.int8)


def _multiply(values: Tensor, scales: Tensor) -> Tensor:
    """Return the product in the type of the scales, as engines do: of 8 bits in bfloat16 off by up to half a step."""
    return values.to(scales.dtype) * scales


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the damped Hessian's inverse, fp32 [I, I]."""
    damped = hessian.double().clone()
    diagonal = damped.diagonal()
    never_met = diagonal == 0
    diagonal += damping * diagonal.mean()
    diagonal[never_met] = 1.0
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()
