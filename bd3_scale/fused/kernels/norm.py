"""Compute RMSNorm of a residual sum, forward and backward, in fp32.

Legend: X hidden size, BLOCK the power of two that holds it, ROWS rows of a tile, r = 1 / √(mean of x² + eps).
"""

import triton
import triton.language as tl


@triton.jit
def add_rms_norm_kernel(
    A, B, WEIGHT, TOTAL, NORMED, SCALE, num_rows, size, eps, a_row, b_row,
    HAS_B: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write TOTAL = A + B, its norm NORMED, both [M, X], and SCALE [M] = r, of ROWS rows; without B, A is normed."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    i = tl.arange(0, BLOCK)
    valid = (row < num_rows)[:, None] & (i < size)[None, :]
    at = row[:, None] * size + i[None, :]
    x = tl.load(A + row[:, None] * a_row + i[None, :], mask=valid, other=0.0).to(tl.float32)
    if HAS_B:
        x += tl.load(B + row[:, None] * b_row + i[None, :], mask=valid, other=0.0).to(tl.float32)
        # The norm is computed of the rounded sum: backward reads that one, and must see the same numbers.
        total = x.to(TOTAL.dtype.element_ty)
        tl.store(TOTAL + at, total, mask=valid)
        x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / size + eps)
    weight = tl.load(WEIGHT + i, mask=i < size, other=0.0).to(tl.float32)
    tl.store(NORMED + at, (x * scale[:, None] * weight[None, :]).to(NORMED.dtype.element_ty), mask=valid)
    tl.store(SCALE + row, scale, mask=row < num_rows)


@triton.jit
def add_rms_norm_backward_kernel(
    GRAD_TOTAL, GRAD_NORMED, TOTAL, WEIGHT, SCALE, GRAD, PART, num_rows, size, tiles, total_grad_row, normed_grad_row,
    HAS_TOTAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write GRAD = GRAD_TOTAL + r · (w · g − x̂ · mean(w · g · x̂)) of `tiles` tiles, and PART [programs, X].

    g is GRAD_NORMED and x̂ = TOTAL · r. PART is Σ g · x̂ over the program's tiles, its part of the weight's gradient.
    Each program has the same tiles in every run, so that sums are reproducible.
    """
    i = tl.arange(0, BLOCK)
    inside = i < size
    part = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(0, tiles):
        row = (tl.program_id(0) * tiles + tile) * ROWS + tl.arange(0, ROWS).to(tl.int64)
        valid = (row < num_rows)[:, None] & inside[None, :]
        at = row[:, None] * size + i[None, :]
        scale = tl.load(SCALE + row, mask=row < num_rows, other=0.0)[:, None]
        unit = tl.load(TOTAL + at, mask=valid, other=0.0).to(tl.float32) * scale
        grad = tl.load(GRAD_NORMED + row[:, None] * normed_grad_row + i[None, :], mask=valid, other=0.0).to(tl.float32)
        part += grad * unit
        grad *= tl.load(WEIGHT + i, mask=inside, other=0.0).to(tl.float32)[None, :]
        out = (grad - unit * (tl.sum(grad * unit, 1) / size)[:, None]) * scale
        if HAS_TOTAL:
            more = GRAD_TOTAL + row[:, None] * total_grad_row + i[None, :]
            out += tl.load(more, mask=valid, other=0.0).to(tl.float32)
        tl.store(GRAD + at, out.to(GRAD.dtype.element_ty), mask=valid)
    tl.store(PART + tl.program_id(0).to(tl.int64) * size + i, tl.sum(part, 0), mask=inside)
