"""Rotary position embedding (Su et al., 2021), half-split as in Llama and Qwen.

megatron's own counts rows; here the noisy and the clean row of one token share a position, and positions restart at
every packed document, so that angles come from explicit positions.

Legend: S streams, R positions, B sequences, H heads, D dimensions a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotary_table(positions_BR: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Tensor:
    """cos and sin of the rotary angles, [2, R, B, 1, D] in `dtype` (computed in fp32), for integer positions [B, R]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_BR.device) / head_dim
    angles = positions_BR.t().float()[..., None] * theta**-exponents
    angles = torch.cat([angles, angles], dim=-1)[:, :, None]
    return torch.stack([angles.cos(), angles.sin()]).to(dtype)


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """Rotate queries or keys [S·R, B, H, D], streams of the same positions, by `rotary_table`."""
    return _Rotate.apply(x, *table)


class _Rotate(torch.autograd.Function):
    """Two passes over memory in either direction, of which the backward turns the other way round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, -1), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    x = x.unflatten(0, (-1, cos.shape[0]))
    out = torch.mul(x, cos)
    (low, high), (out_low, out_high), (sin_low, sin_high) = (t.chunk(2, dim=-1) for t in (x, out, sin))
    out_low.addcmul_(high, sin_low, value=-direction)
    out_high.addcmul_(low, sin_high, value=direction)
    return out.flatten(0, 1)
