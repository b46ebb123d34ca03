"""RMSNorm (Zhang & Sennrich, 2019), alone and of a residual sum, with its arithmetic in fp32.

Legend: X hidden size; r = 1 / √(mean of x² + eps), one number a row; x̂ = x · r.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def add_rms_norm(x: Tensor, more: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + more and its norm, both [..., X], of x and more [..., X] and weight [X]."""
    if torch.is_grad_enabled() and (x.requires_grad or more.requires_grad or weight.requires_grad):
        return _AddRMSNorm.apply(x, more, weight, eps)
    total, normed, _ = _forward(x, more, weight, eps)
    return total, normed


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x · weight / √(mean of x² + eps), [..., X], of x [..., X] and weight [X]."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RMSNorm.apply(x, weight, eps)
    return norm_forward(x, weight, eps)[0]


class _AddRMSNorm(torch.autograd.Function):
    """Keeps the sum, which the next residual sum keeps anyway, and r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, more: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total, normed, scale = _forward(x, more, weight, eps)
        ctx.save_for_backward(total, weight, scale)
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, grad_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_normed is None:
            return grad_total, grad_total, None, None
        grad, grad_weight = norm_backward(grad_normed, *ctx.saved_tensors)
        if grad_total is not None:
            grad += grad_total
        return grad, grad, grad_weight, None


class _RMSNorm(torch.autograd.Function):
    """PyTorch's own is put together from many operators on CPU, and its backward from more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, scale = norm_forward(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return *norm_backward(grad, *ctx.saved_tensors), None


def _forward(x: Tensor, more: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    total = x + more
    return total, *norm_forward(total, weight, eps)


def norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the norm of x [..., X] and r [..., 1] in fp32 (fp64 of such x)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * scale).mul_(weight).to(x.dtype), scale


def norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight: r · (w · g − x̂ · mean(w · g · x̂)), and Σ g · x̂ over rows."""
    unit = x * scale
    product = grad * unit
    grad_weight = product.flatten(0, -2).sum(0)
    mean = torch.mv(product.flatten(0, -2), weight.to(product.dtype)).div_(x.shape[-1]).view(scale.shape)
    grad_x = torch.mul(grad, weight.to(product.dtype)).addcmul_(unit, mean, value=-1).mul_(scale)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)
