"""RMSNorm (Zhang & Sennrich, 2019) of a residual sum, with its arithmetic in fp32.

Legend: X hidden size; r = 1 / √(mean of x² + eps), one number a row; x̂ = x · r.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bd3_scale.fused import ops
from bd3_scale.fused.parts import CACHED, parts


def add_rms_norm(x: Tensor, more: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + more, or x where there is no more, and its norm, both [..., X], of x and more [..., X], weight [X]."""
    leaves = (x, more, weight)
    if torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves):
        return _AddRMSNorm.apply(x, more, weight, eps)
    total, normed, _ = _forward(x, more, weight, eps)
    return total, normed


class _AddRMSNorm(torch.autograd.Function):
    """Keeps the sum, which the next residual sum keeps anyway, and r."""

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
    """Return the norm of x [..., X], and its r."""
    scale = norm_scale(x, eps)
    if x.dtype == scale.dtype or x.numel() <= CACHED:
        return (x * scale).mul_(weight).to(x.dtype), scale
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    for rows in parts(x):
        normed[rows] = (x[rows] * scale[rows]).mul_(weight)
    return normed, scale


def norm_scale(x: Tensor, eps: float) -> Tensor:
    """Return r of x [..., X]: [..., 1], fp32 (fp64 of such x)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, grad_x: Tensor | None = None, more: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight: r · (w · g − x̂ · mean(w · g · x̂)), and Σ g · x̂ over rows.

    grad_x: where the first goes, to a new tensor otherwise; more: what is added to it.
    """
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if grad_x is None else grad_x
    wide = weight.to(scale.dtype)
    grad_weight: Tensor | None = None
    for rows in parts(x):
        unit, own = x[rows] * scale[rows], grad[rows].to(scale.dtype)
        product = own * unit
        flat = product.flatten(0, -2)
        grad_weight = flat.sum(0) if grad_weight is None else grad_weight.add_(flat.sum(0))
        mean = torch.mv(flat, wide).div_(x.shape[-1]).view(scale[rows].shape)
        found = torch.mul(own, wide, out=product).addcmul_(unit, mean, value=-1)
        if more is None:
            torch.mul(found, scale[rows], out=grad_x[rows])
        else:
            torch.addcmul(more[rows], found, scale[rows], out=grad_x[rows])
    return grad_x, torch.zeros_like(weight) if grad_weight is None else grad_weight
