"""Weights in 4 or 8 bits: round to nearest, and GPTQ (Frantar et al., ICLR 2023), on plain tensors.

Legend: O output features (rows of a weight), I input features (columns), G groups of columns that share a scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


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
        """[O, I] in the type of the scales: what an engine multiplies with."""
        group_size = self.values.shape[1] // self.scales.shape[1]
        values = self.values.to(self.scales.dtype).unflatten(1, (-1, group_size))
        return (values * self.scales[:, :, None]).flatten(1)


class HessianSum:
    """Σ x xᵀ over the rows x that a weight is multiplied with, fp32 [I, I]: half the Hessian of its squared output
    error in each of its rows.
    """

    def __init__(self, features: int, device: torch.device | None = None) -> None:
        self.hessian = torch.zeros(features, features, device=device)

    def add(self, rows: Tensor) -> None:
        """rows: [N, I]."""
        rows = rows.float()
        self.hessian.addmm_(rows.t(), rows)


def round_to_nearest(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> QuantizedWeight:
    """Each weight [O, I] at the nearest multiple of its group's scale.

    ValueError: the input features do not divide into groups.
    """
    _check(weight, scheme)
    grouped = weight.float().unflatten(1, (-1, scheme.group_size))
    scales = _scales(grouped, scheme, scale_dtype)
    return QuantizedWeight(_round(grouped, scales[..., None], scheme).flatten(1), scales)


def gptq(
    weight: Tensor, hessian: Tensor, scheme: Scheme, scale_dtype: torch.dtype, damping: float = 0.01
) -> QuantizedWeight:
    """Column after column at the nearest multiple, its error made up for by the columns that are still to come.

    The error of a column is spread as the closed form of optimal brain surgeon says, by the inverse of `hessian`
    [I, I] among the columns to come, which its Cholesky factor holds (paper, section 3.3). A group's scale is fixed
    when its first column comes. Columns stay in their order, as engines read them.

    Args:
        damping: share of the mean diagonal that is added to the diagonal, so that it can be inverted. A feature that
            was never met has no part in the error, and is rounded to nearest.

    ValueError: the input features do not divide into groups.
    """
    _check(weight, scheme)
    rest = weight.float().clone()
    factor = _inverse_factor(hessian, damping)
    size = scheme.group_size
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), weight.shape[1] // size, dtype=scale_dtype, device=weight.device)
    for group, start in enumerate(range(0, weight.shape[1], size)):
        here = slice(start, start + size)
        columns, corner = rest[:, here], factor[here, here]
        scales[:, group] = _scales(columns, scheme, scale_dtype)
        errors = torch.empty_like(columns)
        for i in range(size):
            rounded = _round(columns[:, i], scales[:, group], scheme)
            values[:, start + i] = rounded
            errors[:, i] = (columns[:, i] - rounded.float() * scales[:, group].float()) / corner[i, i]
            columns[:, i + 1 :] -= errors[:, i, None] * corner[i, i + 1 :]
        rest[:, start + size :] -= errors @ factor[here, start + size :]
    return QuantizedWeight(values, scales)


def output_error(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> float:
    """‖(W − Ŵ)X‖² / ‖WX‖² over the rows X of `hessian`; 0 where nothing comes out."""
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


def _scales(grouped: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """Of groups [..., size]: the largest magnitude is in the middle of the last step, as in compressed-tensors."""
    scales = grouped.abs().amax(-1) / ((scheme.highest - scheme.lowest) / 2)
    # A group of zeros needs a scale all the same, and one that the type can hold.
    return scales.clamp(min=torch.finfo(dtype).tiny).to(dtype)


def _round(weights: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:
    return (weights / scales.float()).round().clamp(scheme.lowest, scheme.highest).to(torch.int8)


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the damped Hessian's inverse, fp32 [I, I]."""
    damped = hessian.double().clone()
    diagonal = damped.diagonal()
    never_met = diagonal == 0
    diagonal += damping * diagonal.mean()
    diagonal[never_met] = 1.0
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()
