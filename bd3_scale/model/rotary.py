"""Rotary position embedding (Su et al., 2021), half-split as in Llama and Qwen.

megatron's own counts rows; here the noisy and the clean row of one token share a position, and positions restart at
every packed document, so that angles come from explicit positions.

Legend: S streams, R positions, B sequences, H heads, D dimensions a head.
"""

from __future__ import annotations

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
    cos, sin = table
    x = x.unflatten(0, (-1, table.shape[1]))
    low, high = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-high, low], dim=-1) * sin).flatten(0, 1)
