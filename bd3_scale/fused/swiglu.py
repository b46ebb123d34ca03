"""Compute SwiGLU (Shazeer, 2020), and keep only its input for backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bd3_scale.fused import ops


def swiglu(x: Tensor) -> Tensor:
    """Return silu(gate) · up, [..., F], of x = [gate, up], [..., 2F]."""
    # Decoding needs no gradient, and an autograd function takes longer than the arithmetic of a small block.
    return _SwiGLU.apply(x) if torch.is_grad_enabled() and x.requires_grad else _forward(x)


class _SwiGLU(torch.autograd.Function):
    """SwiGLU with its own backward.

    Autograd's would keep gate, up and silu(gate), and concatenate the gradients of the two halves by a copy.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _backward(grad, *ctx.saved_tensors)


def _forward(x: Tensor) -> Tensor:
    if ops.kernels_take(x):
        return ops.swiglu(x)
    gate, up = x.chunk(2, -1)
    return F.silu(gate).mul_(up)


def swiglu_backward(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of x [..., 2F], and swiglu(x) once more, from the gradient of swiglu(x) [..., F].

    The backward of the product that follows needs both; the kernel reads x once for the two.
    """
    if ops.kernels_take(x):
        return ops.swiglu_backward(grad, x)
    return _backward(grad, x), _forward(x)


def _backward(grad: Tensor, x: Tensor) -> Tensor:
    if ops.kernels_take(x):
        return ops.swiglu_backward(grad, x)[0]
    gate, up = x.chunk(2, -1)
    grad_x = torch.empty_like(x)
    grad_gate, grad_up = grad_x.chunk(2, -1)
    torch.mul(grad, F.silu(gate), out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
    return grad_x
