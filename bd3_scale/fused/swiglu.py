"""SwiGLU (Shazeer, 2020), which keeps its input alone for backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bd3_scale.fused import ops


def swiglu(x: Tensor) -> Tensor:
    """Return silu(gate) · up, [..., F], of x = [gate, up], [..., 2F]."""
    # Decoding needs no gradient, and a function of autograd costs more time than a block's arithmetic.
    return _SwiGLU.apply(x) if torch.is_grad_enabled() and x.requires_grad else _forward(x)


class _SwiGLU(torch.autograd.Function):
    """Autograd's own would keep gate, up and silu(gate), and join the gradients of the halves by a copy."""

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
    """Return the gradient of x [..., 2F] and swiglu(x) again, of the gradient of swiglu(x) [..., F].

    A product that follows needs both in backward: kernels read x once for them.
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
