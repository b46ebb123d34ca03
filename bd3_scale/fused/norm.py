"""Compute RMSNorm (Zhang & Sennrich, 2019) of a residual sum, with arithmetic in fp32.

y = w · x̂ with x̂ = x · r and r = 1 / √(mean of x² + eps), one number for each row. Squares of bf16 numbers summed over
thousands of channels in bf16 would lose all but two digits, hence fp32.

Legend: X hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bd3_scale.fused import ops
from bd3_scale.fused.parts import CACHED, parts


def add_rms_norm(x: Tensor, more: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the sum x + more (x alone where `more` is None) and its norm, both [..., X]; weight: [X]."""
    leaves = (x, more, weight)
    if torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves):
        return _AddRMSNorm.apply(x, more, weight, eps)
    total, normed, _ = _forward(x, more, weight, eps)
    return total, normed


class _AddRMSNorm(torch.autograd.Function):
    """`add_rms_norm`, which keeps for backward the sum, a tensor that exists anyway, and r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, more: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total, normed, scale = _forward(x, more, weight, eps)
        ctx.save_for_backward(total, weight, scale)
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, grad_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, grad_weight = grad_total, None
        if grad_normed is not None:
            grad, grad_weight = _backward(grad_total, grad_normed, *ctx.saved_tensors)
        return grad, grad if ctx.needs_input_grad[1] else None, grad_weight, None


def _forward(x: Tensor, more: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    if ops.kernels_take(x, norm=x.shape[-1]):
        total, normed, scale = ops.add_rms_norm(x, more, weight, eps)
        return x if more is None else total, normed, scale
    total = x if more is None else x + more
    return total, *norm_forward(total, weight, eps)


def _backward(
    grad_total: Tensor | None, grad_normed: Tensor, total: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    if ops.kernels_take(total, norm=total.shape[-1]):
        grad, part = ops.add_rms_norm_backward(grad_total, grad_normed, total, weight, scale)
        return grad, part.sum(0)
    return norm_backward(grad_normed, total, weight, scale, more=grad_total)


def norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the norm of x [..., X], and r."""
    scale = norm_scale(x, eps)
    if x.dtype == scale.dtype or x.numel() <= CACHED:
        return (x * scale).mul_(weight).to(x.dtype), scale
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    for rows in parts(x):
        normed[rows] = (x[rows] * scale[rows]).mul_(weight)
    return normed, scale


def norm_scale(x: Tensor, eps: float) -> Tensor:
    """Return r of x [..., X]: [..., 1] in fp32, or in fp64 for fp64 x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, grad_x: Tensor | None = None, more: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight, r · (w · g − x̂ · mean(w · g · x̂)) and Σ g · x̂ over rows.

    The second term of the first gradient comes from r, which depends on all channels of a row.

    grad_x: the tensor to write the first into, a new one by default; more: a tensor to add to it.
    """
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if grad_x is None else grad_x
    wide = weight.to(scale.dtype)
    grad_weight: Tensor | None = None
    for rows in parts(x):
        unit, gradient = x[rows] * scale[rows], grad[rows].to(scale.dtype)
        product = gradient * unit
        flat = product.flatten(0, -2)
        grad_weight = flat.sum(0) if grad_weight is None else grad_weight.add_(flat.sum(0))
        mean = torch.mv(flat, wide).div_(x.shape[-1]).view(scale[rows].shape)
        by_unit = torch.mul(gradient, wide, out=product).addcmul_(unit, mean, value=-1)
        if more is None:
            torch.mul(by_unit, scale[rows], out=grad_x[rows])
        else:
            torch.addcmul(more[rows], by_unit, scale[rows], out=grad_x[rows])
    return grad_x, torch.zeros_like(weight) if grad_weight is None else grad_weight
