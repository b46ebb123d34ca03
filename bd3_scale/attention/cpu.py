"""Two-stream attention on CPU: one scaled-dot-product attention a chunk of positions, over the keys the chunk can see.

For a chunk of C positions the queries are its noisy and clean rows and the keys the ranges of either stream that any of
them sees: L² + 3LC query-key pairs instead of the 4L² of a dense mask. Each call is PyTorch's flash kernel for CPU
(FlashAttention-2, Dao, 2023), which takes grouped query heads as they are and keeps no scores; masks are made again in
backward.

Legend: B batch, H heads, N rows or keys of a chunk, K its keys, D head size. A pair is (noisy, clean), either optional.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from bd3_scale.attention.dispatch import QKV

CHUNK = 64

Pair = Sequence[Tensor | None]
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def chunked_attention(
    noisy: QKV | None, clean: QKV | None, spans: Tensor, scale: float
) -> tuple[Tensor | None, Tensor | None]:
    """`block_attention` for bfloat16, float32 or float64 tensors on CPU; deterministic."""
    nothing = (None, None, None)
    q, k, v = zip(noisy or nothing, clean or nothing, strict=True)
    return _ChunkedAttention.apply(spans, scale, *q, *k, *v)


class _Chunk(NamedTuple):
    rows: tuple[slice, slice]
    keys: tuple[slice, slice]
    mask: Tensor | None


class _ChunkedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spans: Tensor, scale: float, *qkv: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v = qkv[0:2], qkv[2:4], qkv[4:6]
        out = tuple(None if x is None else torch.empty_like(x) for x in q)
        logsumexps = []
        for chunk in _chunks(spans, q, k):
            out_BHND, logsumexp = _flash(
                _take(q, chunk.rows), _take(k, chunk.keys), _take(v, chunk.keys), attn_mask=chunk.mask, scale=scale
            )
            for target, piece in _split(out, chunk.rows, out_BHND):
                target.copy_(piece)
            logsumexps.append(logsumexp)
        ctx.scale = scale
        ctx.save_for_backward(spans, *qkv, *out, *logsumexps)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        spans, *saved = ctx.saved_tensors
        q, k, v, out, logsumexps = saved[0:2], saved[2:4], saved[4:6], saved[6:8], saved[8:]
        # Chunks add up in float32 at the least: a key gathers gradients from every later chunk.
        grads = [None if x is None else x.new_zeros(x.shape, dtype=_accumulator(x)) for x in (*q, *k, *v)]
        for chunk, logsumexp in zip(_chunks(spans, q, k), logsumexps, strict=True):
            grad_q_BHND, grad_k_BHND, grad_v_BHND = _flash_backward(
                _take(grad_out, chunk.rows),
                _take(q, chunk.rows),
                _take(k, chunk.keys),
                _take(v, chunk.keys),
                _take(out, chunk.rows),
                logsumexp,
                0.0,
                False,
                attn_mask=chunk.mask,
                scale=ctx.scale,
            )
            for target, piece in (
                *_split(grads[0:2], chunk.rows, grad_q_BHND),
                *_split(grads[2:4], chunk.keys, grad_k_BHND),
                *_split(grads[4:6], chunk.keys, grad_v_BHND),
            ):
                target.add_(piece)
        return None, None, *(None if g is None else g.to(x.dtype) for g, x in zip(grads, saved, strict=False))


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _chunks(spans: Tensor, q: Pair, k: Pair) -> Iterator[_Chunk]:
    """Chunks in order, with the key ranges that the whole batch needs: spans never decrease along a sequence."""
    if bool((spans == spans[:, :1]).all()):
        spans = spans[:, :1]
    seq_len = spans.shape[2]
    first = torch.arange(0, seq_len, CHUNK)
    last = (first + CHUNK - 1).clamp(max=seq_len - 1)
    lowest = spans[:, :, first].amin(1).tolist()
    highest = spans[:, :, last].amax(1).tolist()
    for i, start in enumerate(first.tolist()):
        positions = slice(start, min(start + CHUNK, seq_len))
        # Without clean queries no clean key of the own block is seen.
        clean_end = highest[1][i] if q[1] is None else highest[2][i]
        rows = tuple(slice(0, 0) if x is None else positions for x in q)
        keys = (
            slice(0, 0) if k[0] is None else slice(lowest[1][i], highest[2][i]),
            slice(0, 0) if k[1] is None else slice(lowest[0][i], clean_end),
        )
        dtype = next(x.dtype for x in k if x is not None)
        yield _Chunk(
            (rows[0], rows[1]), keys, _mask(spans[:, :, positions], (q[0] is not None, q[1] is not None), keys, dtype)
        )


def _mask(spans: Tensor, has_rows: tuple[bool, bool], keys: tuple[slice, slice], dtype: torch.dtype) -> Tensor | None:
    """Additive mask [B or 1, 1, N, K]; None where every row sees every key."""
    doc_start, block_start, block_end = spans.unsqueeze(-1)
    noisy_key, clean_key = (torch.arange(r.start, r.stop, dtype=torch.int32) for r in keys)
    visible = []
    if has_rows[0]:
        own_block = (block_start <= noisy_key) & (noisy_key < block_end)
        visible.append(torch.cat([own_block, (doc_start <= clean_key) & (clean_key < block_start)], 2))
    if has_rows[1]:
        no_noisy = torch.zeros(*spans.shape[1:], len(noisy_key), dtype=torch.bool)
        visible.append(torch.cat([no_noisy, (doc_start <= clean_key) & (clean_key < block_end)], 2))
    hidden = torch.cat(visible, 1).logical_not_().unsqueeze(1)
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf")) if hidden.any() else None


def _take(pair: Pair, ranges: tuple[slice, slice]) -> Tensor:
    """[B, H, N, D]: the ranges of both streams one after the other."""
    return torch.cat([x[:, r] for x, r in zip(pair, ranges, strict=True) if x is not None], 1).transpose(1, 2)


def _split(pair: Pair, ranges: tuple[slice, slice], x_BHND: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The inverse of `_take`: each stream's view of its range with the part of `x_BHND` that belongs there."""
    x_BNHD = x_BHND.transpose(1, 2)
    noisy_size = ranges[0].stop - ranges[0].start
    pieces = (x_BNHD[:, :noisy_size], x_BNHD[:, noisy_size:])
    return [(x[:, r], piece) for x, r, piece in zip(pair, ranges, pieces, strict=True) if x is not None]
