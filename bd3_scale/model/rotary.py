"""Rotary position embedding (Su et al., 2021), half-split as in Llama and Qwen.

megatron's own counts rows; here the noisy and the clean row of one token share a position, and positions restart at
every packed document, so that angles come from explicit positions.

Legend: S streams, R positions, B sequences, H heads, D dimensions a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bd3_scale.recipe.schema import ModelRecipe, RopeScaling


def rotary_table(positions_BR: Tensor, model: ModelRecipe, dtype: torch.dtype) -> Tensor:
    """cos and sin of the rotary angles, [2, R, B, 1, D] in `dtype` (computed in fp32), for integer positions [B, R]."""
    exponents = torch.arange(0, model.head_size, 2, dtype=torch.float32, device=positions_BR.device) / model.head_size
    frequencies = model.rope_theta**-exponents
    if model.rope_scaling is not None:
        frequencies = _stretch(frequencies, model.rope_scaling)
    angles = positions_BR.t().float()[..., None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)[:, :, None]
    return torch.stack([angles.cos(), angles.sin()]).to(dtype)


def _stretch(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3's: waves longer than the trained context / low_freq_factor turn `factor` times slower, those shorter
    than it / high_freq_factor as before, and those between by an interpolation.
    """
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


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
