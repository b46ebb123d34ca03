"""Launch the kernels with their shapes, strides, tiles and grids, for the operators of `bd3_scale.fused.ops`."""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor

from bd3_scale.fused.kernels import cross_entropy as logits_kernels
from bd3_scale.fused.kernels import heads as head_kernels
from bd3_scale.fused.kernels import norm as norm_kernels
from bd3_scale.fused.kernels import swiglu as swiglu_kernels
from bd3_scale.fused.kernels.tiles import BLOCK, LOGITS, head_tile, norm_tile, programs


def swiglu(x: Tensor) -> Tensor:
    """Return swiglu(x), [..., F], for x [..., 2F]."""
    channels = x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], channels))
    rows = _rows(x)
    if out.numel():
        with _on(x.device):
            swiglu_kernels.swiglu_kernel[(len(rows) * triton.cdiv(channels, BLOCK),)](
                rows, out, channels, rows.stride(0), BLOCK=BLOCK
            )
    return out


def swiglu_backward(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of x [..., 2F], and swiglu(x) once more, [..., F]."""
    channels = x.shape[-1] // 2
    grad_x, out = x.new_empty(x.shape), x.new_empty(grad.shape)
    grad, x = _rows(grad), _rows(x)
    if grad.numel():
        with _on(x.device):
            swiglu_kernels.swiglu_backward_kernel[(len(x) * triton.cdiv(channels, BLOCK),)](
                grad, x, grad_x, out, channels, grad.stride(0), x.stride(0), BLOCK=BLOCK
            )
    return grad_x, out


def add_rms_norm(x: Tensor, more: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum (empty where `more` is None), its norm [..., X], and r [..., 1] in fp32."""
    total, normed = x.new_empty(0 if more is None else x.shape), x.new_empty(x.shape)
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    has_more, x = more is not None, _rows(x)
    more = x if more is None else _rows(more)
    if x.numel():
        tile = norm_tile(x.shape[1])
        with _on(x.device):
            norm_kernels.add_rms_norm_kernel[(triton.cdiv(len(x), tile.rows),)](
                x, more, weight.contiguous(), total, normed, scale, *x.shape, eps, x.stride(0), more.stride(0),
                HAS_B=has_more, ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.num_warps,
            )  # fmt: skip
    return total, normed, scale


def add_rms_norm_backward(
    grad_total: Tensor | None, grad_normed: Tensor, total: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the sum [..., X], and that of the weight in parts [P, X], fp32, which are to be summed."""
    grad = total.new_empty(total.shape)
    grad_normed, total, scale = _rows(grad_normed), _rows(total).contiguous(), scale.contiguous()
    more = grad_normed if grad_total is None else _rows(grad_total)
    tile = norm_tile(total.shape[1])
    count, tiles = programs(len(total), tile.rows)
    part = total.new_empty((count, total.shape[1]), dtype=torch.float32)
    if total.numel():
        with _on(total.device):
            norm_kernels.add_rms_norm_backward_kernel[(count,)](
                more, grad_normed, total, weight.contiguous(), scale, grad, part, *total.shape, tiles, more.stride(0),
                grad_normed.stride(0), HAS_TOTAL=grad_total is not None, ROWS=tile.rows, BLOCK=tile.block,
                num_warps=tile.num_warps,
            )  # fmt: skip
    return grad, part


def qkv_heads(
    qkv: Tensor,
    num_queries: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return queries [N, B, G·q, D] and keys [N, B, G, D]."""
    size = cos.shape[-1]
    groups = qkv.shape[-1] // ((num_queries + 2) * size)
    query = qkv.new_empty((*qkv.shape[:-1], groups * num_queries, size))
    key = qkv.new_empty((*qkv.shape[:-1], groups, size))
    rows = _rows(qkv)
    if key.numel():
        tile = head_tile(size)
        weights = (_weight(q_weight, rows), _weight(k_weight, rows))
        with _on(qkv.device):
            head_kernels.qkv_heads_kernel[(triton.cdiv(len(rows) * groups * (num_queries + 1), tile.heads),)](
                rows, *weights, cos.contiguous(), sin.contiguous(), query, key, len(rows), eps, rows.stride(0),
                Q=num_queries, GROUPS=groups, HALF=size // 2, PADDED=tile.padded, HEADS=tile.heads,
                NORM=q_weight is not None, num_warps=tile.num_warps,
            )  # fmt: skip
    return query, key


def qkv_heads_backward(
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    qkv: Tensor | None,
    num_queries: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of qkv [N, B, G·(q+2)·D], and those of the weights in parts [P, 2, D], fp32.

    Without norms P is 0.
    """
    groups, size = grad_key.shape[-2:]
    heads = groups * (num_queries + 2)
    grad = grad_key.new_empty((*grad_key.shape[:-2], heads * size))
    tile = head_tile(size)
    num_rows = grad.shape[:-1].numel()
    count, tiles = programs(num_rows * heads, tile.heads)
    part = grad.new_empty((0 if qkv is None else count, 2, size), dtype=torch.float32)
    if grad.numel():
        grads = (grad_query.contiguous(), grad_key.contiguous(), grad_value.contiguous())
        rows = grad if qkv is None else _rows(qkv)
        with _on(grad.device):
            head_kernels.qkv_heads_backward_kernel[(count,)](
                *grads, rows, _weight(q_weight, rows), _weight(k_weight, rows), cos.contiguous(), sin.contiguous(),
                grad, part, num_rows, tiles, eps, rows.stride(-2),
                Q=num_queries, GROUPS=groups, HALF=size // 2, PADDED=tile.padded, HEADS=tile.heads,
                NORM=qkv is not None, num_warps=tile.num_warps,
            )  # fmt: skip
    return grad, part


def row_statistics(logits: Tensor, targets: Tensor, first_id: int, forbidden: Tensor) -> Tensor:
    """Return fp32 [3, M]: maximum, Σ exp(logit − maximum), the target's logit."""
    statistics = logits.new_empty((3, len(logits)), dtype=torch.float32)
    logits = _rows(logits)
    if len(logits):
        with _on(logits.device):
            logits_kernels.row_statistics_kernel[(len(logits),)](
                logits, targets.contiguous(), _bytes(forbidden), statistics, *logits.shape, first_id, logits.stride(0),
                BLOCK=LOGITS.block, num_warps=LOGITS.num_warps,
            )  # fmt: skip
    return statistics


def logit_gradient_(
    logits: Tensor,
    targets: Tensor,
    first_id: int,
    forbidden: Tensor,
    log_total: Tensor,
    softmax_scale: Tensor,
    target_scale: Tensor,
) -> None:
    """Turn logits [M, V], with contiguous rows, into their gradient, in place."""
    assert logits.stride(1) == 1 or logits.shape[1] == 1, logits.stride()
    if logits.numel():
        of_rows = (x.contiguous() for x in (log_total, softmax_scale, target_scale))
        blocks = triton.cdiv(logits.shape[1], LOGITS.block)
        with _on(logits.device):
            logits_kernels.logit_gradient_kernel[(len(logits) * blocks,)](
                logits, targets.contiguous(), _bytes(forbidden), *of_rows, logits.shape[1], first_id,
                logits.stride(0), BLOCK=LOGITS.block, num_warps=LOGITS.num_warps,
            )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    """Return x [..., X] as [M, X] with contiguous rows; the stride between rows may be any."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _weight(weight: Tensor | None, instead: Tensor) -> Tensor:
    """Return a norm's weight; without a norm any tensor, since a kernel needs a pointer but will not read it."""
    return instead if weight is None else weight.contiguous()


def _bytes(forbidden: Tensor) -> Tensor:
    return forbidden.contiguous().view(torch.uint8)


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
