"""Quantise weights to 4 or 8 bits by rounding to nearest, or by GPTQ (Frantar et al., ICLR 2023), on plain tensors.

Legend: O output features (rows of a weight), I input features (columns), G groups of columns that share a scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Columns that GPTQ processes before it updates all later ones at once (paper, section 3.3, "lazy batch-updates"): the
# result is the same, and the large update runs as one matrix product.
BLOCK = 128
# Candidates for the largest value of a group, relative to its largest magnitude.
CLIPPING = (1.0, 0.95, 0.9, 0.85, 0.8)
SMALLEST_SCALE = 2.0**-24  # the smallest positive float16
# Least calibration rows per input feature for GPTQ. A Hessian of fewer rows is mostly chance: measured on other rows
# with uncorrelated features, GPTQ's error is 2.7 times that of rounding with 1 row per feature, and 1.1 times with 4.
LEAST_ROWS = 4
# Least rows for an importance matrix, which estimates only one number per feature: with 64, weighting by it was never
# worse than no weighting by more than 1 %, even for inputs with heavy tails.
LEAST_ROWS_OF_SQUARES = 64


@dataclass(frozen=True)
class Scheme:
    """Symmetric integers of `bits`, with one scale for every `group_size` input features of an output feature."""

    bits: Literal[4, 8]
    group_size: int = 128

    @property
    def lowest(self) -> int:
        """Return the smallest integer."""
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """Return the largest integer."""
        return (1 << (self.bits - 1)) - 1


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantised weight. values: int8 [O, I]; scales: [O, G], in the dtype in which they are stored."""

    values: Tensor
    scales: Tensor

    def dequantize(self) -> Tensor:
        """Return the weight [O, I] in the dtype of the scales, as engines compute it."""
        group_size = self.values.shape[1] // self.scales.shape[1]
        return _multiply(self.values.unflatten(1, (-1, group_size)), self.scales[..., None]).flatten(1)


class HessianSum:
    """Sums x xᵀ over the input rows x of a linear layer, fp32 [I, I]. rows: number of rows.

    This is half the Hessian of ‖(W − Ŵ)X‖² with respect to any row of the weight.
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
        """Tell whether there are enough rows for GPTQ to be better than rounding."""
        return self.rows >= LEAST_ROWS * len(self.hessian)


class SquareSum:
    """Sums x² over the input rows x of a linear layer, fp32 [I]: the diagonal of `HessianSum`."""

    def __init__(self, features: int, device: torch.device | None = None) -> None:
        self.rows = 0
        self.squares = torch.zeros(features, device=device)

    def add(self, rows: Tensor) -> None:
        """Add rows [N, I]."""
        self.rows += len(rows)
        self.squares += rows.float().square().sum(0)

    @property
    def is_enough(self) -> bool:
        """Tell whether there are enough rows for an importance matrix to help."""
        return self.rows >= LEAST_ROWS_OF_SQUARES


def round_to_nearest(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> QuantizedWeight:
    """Round each value of a weight [O, I] to the nearest multiple of its group's scale.

    ValueError: the input features do not divide into groups, or a weight is not finite.
    """
    _check(weight, scheme)
    grouped = weight.float().unflatten(1, (-1, scheme.group_size))
    scales = _scales(grouped, scheme, scale_dtype)
    return QuantizedWeight(_round(grouped, scales[..., None], scheme).flatten(1), scales)


def gptq(
    weight: Tensor, hessian: Tensor, scheme: Scheme, scale_dtype: torch.dtype, damping: float = 0.01
) -> QuantizedWeight:
    """Quantise a weight column by column; later columns compensate for the error of earlier ones.

    Column i is rounded to q_i, and with e = (w_i − q_i) / [H⁻¹]_ii every later column j is changed by −e [H⁻¹]_ij,
    where H is restricted to the columns i, i + 1, …: the closed form of Optimal Brain Surgeon (paper, eq. 2). Row i of
    the upper Cholesky factor of H⁻¹ holds these entries for all i at once, up to the factor of its diagonal entry
    (paper, section 3.3).

    Columns with the largest inputs come first, while most columns can still compensate (`act-order` of the authors'
    code). Scales are those of `round_to_nearest` for the original order of columns, since engines read groups in that
    order.

    Args:
        damping: share of the mean diagonal that is added to the diagonal, so that H can be inverted. A feature whose
            inputs are always 0 does not affect the error, and is rounded to nearest.

    ValueError: the input features do not divide into groups, or a weight or the Hessian is not finite.
    """
    _check(weight, scheme)
    if not hessian.isfinite().all():
        raise ValueError("the calibration inputs are not finite: verify the checkpoint, or use float32")
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(hessian[order][:, order], damping)
    scales = _scales(weight.float().unflatten(1, (-1, scheme.group_size)), scheme, scale_dtype)
    # Transposed, so that a column of the weight is contiguous in memory.
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
    """Return ‖(W − Ŵ)X‖² / ‖WX‖² over the rows X of `hessian`; 0 if WX is 0."""
    weight, hessian = weight.double(), hessian.double()
    difference = weight - quantized.dequantize().double()
    whole = float(((weight @ hessian) * weight).sum())
    return float(((difference @ hessian) * difference).sum()) / whole if whole else 0.0


def _check(weight: Tensor, scheme: Scheme) -> None:
    if weight.shape[1] % scheme.group_size:
        raise ValueError(
            f"{weight.shape[1]} input features do not divide into groups of {scheme.group_size}: use a group size "
            "that divides them"
        )
    if not weight.isfinite().all():
        raise ValueError("a weight is not finite, and cannot be quantised: use an earlier checkpoint")


def _scales(grouped: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """Return the scales of groups [..., size], chosen by the least squared error among the `CLIPPING` candidates.

    The widest scale puts the largest magnitude into the middle of the last step, as in compressed-tensors. A smaller
    one clips a few weights, which may cost less than coarse steps for all.
    """
    widest = grouped.abs().amax(-1) / ((scheme.highest - scheme.lowest) / 2)
    # A group of zeros needs a positive scale, too, and one that the dtype can hold.
    candidates = [(widest * share).clamp(min=SMALLEST_SCALE).to(dtype) for share in CLIPPING]
    errors = torch.stack([_squared_error(grouped, scales[..., None], scheme) for scales in candidates])
    return torch.stack(candidates).gather(0, errors.argmin(0, keepdim=True))[0]


def _squared_error(grouped: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:
    rounded = _multiply(_round(grouped, scales, scheme), scales)
    return (rounded.float() - grouped).square().sum(-1)


def _round(weights: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:
    return (weights / scales.float()).round().clamp(scheme.lowest, scheme.highest).to(torch.int8)


def _multiply(values: Tensor, scales: Tensor) -> Tensor:
    """Return the product in the dtype of the scales, as engines compute it.

    With 8 bits in bfloat16, which has 8 significant bits, it is rounded by up to half a step; errors must include that.
    """
    return values.to(scales.dtype) * scales


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the damped Hessian's inverse, fp32 [I, I].

    Computed in float64: in float32 the Cholesky factorisation of an ill-conditioned Hessian fails or loses its digits.
    """
    damped = hessian.double().clone()
    diagonal = damped.diagonal()
    unused = diagonal == 0
    diagonal += damping * diagonal.mean()
    diagonal[unused] = 1.0
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()
