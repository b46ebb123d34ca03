"""Compute SwiGLU, forward and backward, in fp32 with one rounding at the end.

A program takes BLOCK of the F channels of one row. The first F numbers of a row of x are the gate, the others the up
projection.
"""

import triton
import triton.language as tl


@triton.jit
def _place(channels, BLOCK: tl.constexpr):
    """Return the row and the channels of this program, and which channels exist."""
    blocks = tl.cdiv(channels, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return row, i, i < channels


@triton.jit
def swiglu_kernel(X, OUT, channels, x_row, BLOCK: tl.constexpr):
    """Write OUT [M, F] = silu(gate) · up."""
    row, i, valid = _place(channels, BLOCK)
    gate = tl.load(X + row * x_row + i, mask=valid, other=0.0).to(tl.float32)
    up = tl.load(X + row * x_row + channels + i, mask=valid, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(OUT + row * channels + i, out.to(OUT.dtype.element_ty), mask=valid)


@triton.jit
def swiglu_backward_kernel(GRAD, X, GRAD_X, OUT, channels, grad_row, x_row, BLOCK: tl.constexpr):
    """Write GRAD_X [M, 2F], the gradients of gate and up, and OUT [M, F] once more.

    silu(g) = g · σ(g) has the derivative σ · (1 + g · (1 − σ)), which is σ + silu · (1 − σ).
    """
    row, i, valid = _place(channels, BLOCK)
    grad = tl.load(GRAD + row * grad_row + i, mask=valid, other=0.0).to(tl.float32)
    gate = tl.load(X + row * x_row + i, mask=valid, other=0.0).to(tl.float32)
    up = tl.load(X + row * x_row + channels + i, mask=valid, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    grad_gate = grad * up * (sigmoid + silu * (1.0 - sigmoid))
    grad_x = GRAD_X + row * 2 * channels + i
    tl.store(grad_x, grad_gate.to(GRAD_X.dtype.element_ty), mask=valid)
    tl.store(grad_x + channels, (grad * silu).to(GRAD_X.dtype.element_ty), mask=valid)
    tl.store(OUT + row * channels + i, (silu * up).to(OUT.dtype.element_ty), mask=valid)
