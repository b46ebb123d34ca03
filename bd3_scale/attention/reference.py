"""Two-stream attention by a dense mask: the oracle for the other backends, and their stand-in where none fits.

Legend: B batch, L positions, K keys (2L, or L in one stream), H query heads, G key/value heads, R = H / G, D head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bd3_scale.attention.dispatch import QKV


def dense_masks(spans: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Boolean [B, L query, L key] masks, True where seen: noisy to clean, noisy to noisy, clean to clean."""
    doc_start, block_start, block_end = spans.unsqueeze(-1)
    key = torch.arange(spans.shape[2], device=spans.device)
    own_block = (block_start <= key) & (key < block_end)
    before_block = (doc_start <= key) & (key < block_start)
    return before_block, own_block, before_block | own_block


def reference_attention(
    noisy: QKV | None, clean: QKV | None, spans: Tensor, scale: float
) -> tuple[Tensor | None, Tensor | None]:
    """`block_attention` in float32, or float64 where the inputs are, with memory of order B·H·L·2L."""
    noisy_to_clean, noisy_to_noisy, clean_to_clean = dense_masks(spans)
    out_noisy = out_clean = None
    if noisy is not None and clean is not None:
        keys, values = torch.cat([clean.k, noisy.k], 1), torch.cat([clean.v, noisy.v], 1)
        out_noisy = _attend(noisy.q, keys, values, torch.cat([noisy_to_clean, noisy_to_noisy], 2), scale)
    elif noisy is not None:
        out_noisy = _attend(noisy.q, noisy.k, noisy.v, noisy_to_noisy, scale)
    if clean is not None:
        out_clean = _attend(clean.q, clean.k, clean.v, clean_to_clean, scale)
    return out_noisy, out_clean


def _attend(q_BLHD: Tensor | None, k_BKGD: Tensor, v_BKGD: Tensor, mask_BLK: Tensor, scale: float) -> Tensor | None:
    if q_BLHD is None:
        return None
    wide = torch.promote_types(q_BLHD.dtype, torch.float32)
    q_BLGRD = q_BLHD.to(wide).unflatten(2, (k_BKGD.shape[2], -1))
    scores_BGRLK = torch.einsum("blgrd,bkgd->bgrlk", q_BLGRD, k_BKGD.to(wide)) * scale
    weights_BGRLK = scores_BGRLK.masked_fill(~mask_BLK[:, None, None], float("-inf")).softmax(-1)
    out_BLGRD = torch.einsum("bgrlk,bkgd->blgrd", weights_BGRLK, v_BKGD.to(wide))
    return out_BLGRD.flatten(2, 3).to(q_BLHD.dtype)
