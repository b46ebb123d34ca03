"""Run compiled FlexAttention (Dong et al., 2024): a second oracle on GPUs, and the fallback for shapes that the Triton
kernels refuse.

Legend: B batch, R query positions, C noisy copies, N query rows, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.weak import WeakIdKeyDictionary

from bd3_scale.attention.reference import reference_attention
from bd3_scale.attention.spans import own_block

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# Every layer of a model is called with the same spans. The weak keys free a mask together with its spans.
known_masks = WeakIdKeyDictionary()


def flex_block_attention(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, num_noisy: int, scale: float) -> Tensor:
    """Compute `block_attention` of float16, bfloat16 or float32 tensors on CUDA; on CPU only the forward."""
    if q.numel() == 0:
        return reference_attention(q, k, v, spans, num_noisy, scale)
    block_mask = block_mask_of(spans, num_noisy, q.shape[1], k.shape[1])
    out_BHND = _compiled(flex_attention)(
        *(x.transpose(1, 2) for x in (q, k, v)), block_mask=block_mask, scale=scale, enable_gqa=True
    )
    return out_BHND.transpose(1, 2)


def make_mask_mod(spans: Tensor, num_noisy: int, num_rows: int) -> MaskMod:
    """Return FlexAttention's `mask_mod(batch, head, row, key)` for the first `num_rows` of noisy and clean rows."""
    # Every row sees one range of noisy keys and one of clean keys. The compiled kernel loads these four integers a row;
    # computed inside of `mask_mod` they would be computed again for every pair.
    noisy_start, noisy_end, clean_start, clean_end = _key_ranges(spans, num_noisy, num_rows)

    def mask_mod(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        sees_noisy = (noisy_start[b, row] <= key) & (key < noisy_end[b, row])
        return sees_noisy | ((clean_start[b, row] <= key) & (key < clean_end[b, row]))

    return mask_mod


def _key_ranges(spans: Tensor, num_noisy: int, num_rows: int) -> Tensor:
    """Return start and end of the noisy and of the clean keys of each row, int32 [4, B, N], as indices of all keys."""
    doc_start, block_start, block_end = spans[:3]
    own_start, own_end = own_block(spans)
    size = spans.shape[2]
    first_clean = num_noisy * size
    ranges = [
        torch.stack(
            [own_start + copy * size, own_end + copy * size, doc_start + first_clean, block_start + first_clean]
        )
        for copy in range(num_noisy)
    ]
    nothing = torch.zeros_like(doc_start)
    ranges.append(torch.stack([nothing, nothing, doc_start + first_clean, block_end + first_clean]))
    return torch.cat(ranges, 2)[:, :, :num_rows].contiguous()


def block_mask_of(spans: Tensor, num_noisy: int, num_rows: int, num_keys: int) -> BlockMask:
    """Return FlexAttention's mask of the rows and keys of `spans`; it is made once and lives as long as `spans`."""
    # The version counter tells a mask of other values after an in-place change. Inference tensors have no counter.
    version = 0 if spans.is_inference() else spans._version
    masks = known_masks.setdefault(spans, {})
    form = (num_noisy, num_rows, num_keys, version)
    if form not in masks:
        mask_mod = make_mask_mod(spans, num_noisy, num_rows)
        masks[form] = _compiled(create_block_mask)(
            mask_mod, spans.shape[1], None, num_rows, num_keys, device=spans.device
        )
    return masks[form]


@functools.cache
def _compiled(function: Callable) -> Callable:
    # `fullgraph`: after a graph break both functions would run uncompiled, and hold the score of every pair in memory.
    return torch.compile(function, fullgraph=True)
