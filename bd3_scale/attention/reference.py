"""Compute attention by dense boolean masks, in a few plain lines: the oracle for the other backends.

Legend: B batch, R query positions, L clean keys, N rows, K keys, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bd3_scale.attention.spans import own_block


def dense_masks(spans: Tensor, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return boolean masks, True where a query (first word) sees a key (second word).

    Noisy to clean [B, R, L], noisy to noisy [B, R, R], clean to clean [B, R, L].
    """
    doc_start, block_start, block_end = spans[:3].unsqueeze(-1)
    own_start, own_end = (x.unsqueeze(-1) for x in own_block(spans))
    key = torch.arange(num_keys, device=spans.device)
    row = torch.arange(spans.shape[2], device=spans.device)
    in_document = doc_start <= key
    return in_document & (key < block_start), (own_start <= row) & (row < own_end), in_document & (key < block_end)


def dense_mask(spans: Tensor, *, num_noisy: int, num_keys: int, clean_queries: bool) -> Tensor:
    """Return the whole boolean mask [B, query rows, key rows]: noisy copies first, then clean; `num_keys` is L."""
    noisy_to_clean, noisy_to_noisy, clean_to_clean = dense_masks(spans, num_keys)
    none = torch.zeros_like(noisy_to_noisy)
    rows = [
        torch.cat([*(noisy_to_noisy if c == copy else none for c in range(num_noisy)), noisy_to_clean], 2)
        for copy in range(num_noisy)
    ]
    if clean_queries:
        rows.append(torch.cat([none] * num_noisy + [clean_to_clean], 2))
    return torch.cat(rows, 1)


def reference_attention(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, num_noisy: int, scale: float) -> Tensor:
    """Compute `block_attention` in float32, or float64 for float64 inputs; memory grows as B·H·rows·keys."""
    num_noisy_rows = num_noisy * spans.shape[2]
    mask = dense_mask(
        spans,
        num_noisy=num_noisy,
        num_keys=k.shape[1] - num_noisy_rows,
        clean_queries=q.shape[1] > num_noisy_rows,
    )
    return masked_attention(q, k, v, mask, scale)


def masked_attention(q_BNHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, mask_BNK: Tensor, scale: float) -> Tensor:
    """Compute softmax attention [B, N, H, D] under a boolean mask; a row that sees nothing gives zeros."""
    # Autocast would multiply in a 16-bit dtype, whatever the dtype of the inputs.
    with torch.autocast(q_BNHD.device.type, enabled=False):
        return _attend(q_BNHD, k_BKGD, v_BKGD, mask_BNK, scale)


def _attend(q_BNHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, mask_BNK: Tensor, scale: float) -> Tensor:
    wide = torch.promote_types(q_BNHD.dtype, torch.float32)
    q_BNGrD = q_BNHD.to(wide).unflatten(2, (k_BKGD.shape[2], -1))
    scores_BGrNK = torch.einsum("bngrd,bkgd->bgrnk", q_BNGrD, k_BKGD.to(wide)) * scale
    hidden = ~mask_BNK[:, None, None]
    # The least finite number in place of −inf: a row of −inf alone would become nan in softmax and in its gradient.
    # The weights of hidden keys are set to 0 after it.
    weights_BGrNK = scores_BGrNK.masked_fill(hidden, torch.finfo(wide).min).softmax(-1).masked_fill(hidden, 0.0)
    out_BNGrD = torch.einsum("bgrnk,bkgd->bngrd", weights_BGrNK, v_BKGD.to(wide))
    return out_BNGrD.flatten(2, 3).to(q_BNHD.dtype)


def reference_decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float) -> Tensor:
    """Compute `decode_attention` in float32, or float64 for float64 inputs."""
    mask = torch.ones(q.shape[0], q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
    if lengths is not None:
        seen_BK = torch.arange(k.shape[1], device=q.device) < lengths[:, None]
        mask &= seen_BK[:, None]
        # A cache may hold nan or inf beyond the length, and 0 · nan is nan.
        k, v = (x.masked_fill(~seen_BK[:, :, None, None], 0.0) for x in (k, v))
    return masked_attention(q, k, v, mask, scale)
