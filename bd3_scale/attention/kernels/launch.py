"""Launch the kernels with their shapes, strides, tiles and grids: the backend `triton` of `bd3_scale.attention.ops`."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from bd3_scale.attention.kernels import backward as gradients
from bd3_scale.attention.kernels.decode import combine_kernel, decode_kernel
from bd3_scale.attention.kernels.forward import forward_kernel
from bd3_scale.attention.kernels.tiles import DELTA_ROWS, MOST_SPLITS, SCAN, Tile, decode_tile, tile_for, uses_tma

LOG2_E = math.log2(math.e)


class _Call:
    """The sizes and options that all launches of one call have in common."""

    def __init__(self, q: Tensor, k: Tensor, spans: Tensor, num_noisy: int, scale: float, tma: bool | None) -> None:
        self.batch, rows, self.heads, self.head_dim = q.shape
        self.num_rows = spans.shape[2]
        self.num_streams = rows // self.num_rows
        self.num_noisy = num_noisy
        self.num_keys = k.shape[1]
        self.groups = k.shape[2]
        self.spans = spans.contiguous()
        self.scale = scale
        self.dtype, self.device = q.dtype, q.device
        self.tma = _has_tma(q.device) if tma is None else tma

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.batch, self.heads, self.num_rows, self.num_noisy, self.num_streams, self.num_keys

    def row_programs(self, tile: Tile) -> int:
        return self.batch * self.heads * self.num_streams * triton.cdiv(self.num_rows, tile.rows)

    def tile(self, kernel: str) -> Tile:
        return tile_for(kernel, self.head_dim, self.dtype, self.device)

    def options(self, tile: Tile, *, tma: bool, spans: bool = True) -> dict[str, Any]:
        options = {
            "GROUP": self.heads // self.groups, "BM": tile.rows, "BN": tile.keys, "D": self.head_dim, "TMA": tma,
            "PRECISION": _precision(self.dtype), "num_warps": tile.num_warps, "num_stages": tile.num_stages,
        }  # fmt: skip
        return {**options, "NUM_SPANS": self.spans.shape[0]} if spans else options


def forward(
    q: Tensor, k: Tensor, v: Tensor, spans: Tensor, num_noisy: int, scale: float, *, tma: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Return the output [B, rows, H, D] and the base-2 log-sum-exp [B, H, rows]; tma: default as in `_has_tma`."""
    q, k, v = (_rows_of_vectors(x) for x in (q, k, v))
    call = _Call(q, k, spans, num_noisy, scale, tma)
    tile = call.tile("forward")
    out = torch.empty_like(q)
    lse = q.new_empty((call.batch, call.heads, q.shape[1]), dtype=torch.float32)
    k_arg, v_arg = _streamed(call, tile.keys, k, v)
    with _on(q.device):
        forward_kernel[(call.row_programs(tile),)](
            q, k_arg, v_arg, out, lse, call.spans, scale * LOG2_E, *call.sizes, *_strides(q, k, v, out),
            **call.options(tile, tma=call.tma),
        )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spans: Tensor,
    num_noisy: int,
    scale: float,
    deterministic: bool,
    *,
    tma: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; without `deterministic` by the fused form, whose dq rounds differently in
    every run.
    """
    grads = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    grad, q, k, v = (_rows_of_vectors(x) for x in (grad, q, k, v))
    call = _Call(q, k, spans, num_noisy, scale, tma)
    with _on(q.device):
        delta = _delta(call, out, grad)
        if deterministic:
            _query_gradient(call, grad, q, k, v, lse, delta, grads[0])
            _key_gradients(call, grad, q, k, v, lse, delta, None, grads)
        else:
            # float32, as tiles are added one by one, and with rows contiguous within a head, for the atomic additions.
            sum_dq = torch.zeros(
                call.batch, call.heads, q.shape[1], call.head_dim, dtype=torch.float32, device=q.device
            ).transpose(1, 2)
            _key_gradients(call, grad, q, k, v, lse, delta, sum_dq, grads)
            torch.mul(sum_dq, scale, out=grads[0])
    return grads


def decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float) -> Tensor:
    """Return the output [B, Q, H, D] of `decode_attention`."""
    q, k, v = (_rows_of_vectors(x) for x in (q, k, v))
    batch, num_queries, heads, head_dim = q.shape
    num_keys, groups = k.shape[1:3]
    rows = heads // groups * num_queries
    tile = decode_tile(rows, head_dim, q.dtype)
    programs = batch * groups * triton.cdiv(rows, tile.rows)
    # Enough splits to give each multiprocessor two programs; a split has at least two key tiles, since a smaller one
    # would spend its time on starting and on the later sum.
    most = min(max(triton.cdiv(num_keys, 2 * tile.keys), 1), MOST_SPLITS)
    keys_per_split = triton.cdiv(
        triton.cdiv(num_keys, min(most, triton.cdiv(2 * _processors(q.device), programs))), tile.keys
    )
    keys_per_split = max(keys_per_split, 1) * tile.keys
    splits = max(triton.cdiv(num_keys, keys_per_split), 1)
    part = q.new_empty((batch, heads, num_queries, splits, head_dim), dtype=torch.float32)
    lse = q.new_empty((batch, heads, num_queries, splits), dtype=torch.float32)
    out = torch.empty_like(q)
    lengths = None if lengths is None else lengths.contiguous()
    with _on(q.device):
        decode_kernel[(programs * splits,)](
            q, k, v, part, lse, lengths, scale * LOG2_E, heads, num_queries, num_keys, splits, keys_per_split,
            *_strides(q, k, v), GROUP=heads // groups, HAS_LENGTHS=lengths is not None, BM=tile.rows, BN=tile.keys,
            D=head_dim, PRECISION=_precision(q.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        combine_kernel[(batch * heads * num_queries,)](
            part, lse, out, heads, num_queries, splits, *_strides(out),
            SPLITS=triton.next_power_of_2(splits), D=head_dim, num_warps=4,
        )  # fmt: skip
    return out


def _delta(call: _Call, out: Tensor, grad: Tensor) -> Tensor:
    delta = torch.empty((call.batch, call.heads, out.shape[1]), dtype=torch.float32, device=out.device)
    gradients.delta_kernel[(call.batch * call.heads * triton.cdiv(out.shape[1], DELTA_ROWS),)](
        out, grad, delta, call.heads, out.shape[1], *_strides(out, grad), BM=DELTA_ROWS, D=call.head_dim
    )
    return delta


def _query_gradient(
    call: _Call, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, dq: Tensor
) -> None:
    tile = call.tile("query_gradient")
    k_arg, v_arg = _streamed(call, tile.keys, k, v)
    gradients.query_gradient_kernel[(call.row_programs(tile),)](
        q, k_arg, v_arg, grad, dq, lse, delta, call.spans, call.scale, call.scale * LOG2_E, *call.sizes,
        *_strides(q, k, v, grad, dq), **call.options(tile, tma=call.tma),
    )  # fmt: skip


def _key_gradients(
    call: _Call,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    sum_dq: Tensor | None,
    grads: tuple[Tensor, ...],
) -> None:
    """Compute dk and dv of clean and noisy keys; with `sum_dq`, float32 [B, rows, H, D], add dq to it, unscaled."""
    fused = sum_dq is not None
    dq = grads[0] if sum_dq is None else sum_dq
    strides = _strides(q, k, v, grad, dq, *grads[1:])
    programs = call.batch * call.groups
    num_clean = call.num_keys - call.num_noisy * call.num_rows
    tile = call.tile("fused_gradient" if fused else "clean_key_gradient")
    q_arg, grad_arg, dq_arg = (*_streamed(call, tile.rows, q, grad, *([dq] if fused else [])), dq)[:3]
    gradients.clean_key_gradient_kernel[(programs * triton.cdiv(num_clean, tile.keys),)](
        q_arg, k, v, grad_arg, dq_arg, *grads[1:], lse, delta, call.spans, call.scale, call.scale * LOG2_E,
        *call.sizes, *strides, FUSED=fused, SCAN=SCAN, **call.options(tile, tma=call.tma, spans=False),
    )  # fmt: skip
    if call.num_noisy:
        tile = call.tile("noisy_key_gradient")
        noisy_programs = programs * call.num_noisy * triton.cdiv(call.num_rows, tile.keys)
        gradients.noisy_key_gradient_kernel[(noisy_programs,)](
            q, k, v, grad, dq, *grads[1:], lse, delta, call.spans, call.scale, call.scale * LOG2_E,
            *call.sizes, *strides, FUSED=fused, **call.options(tile, tma=False),
        )  # fmt: skip


def _streamed(call: _Call, rows: int, *tensors: Tensor) -> tuple[Any, ...]:
    """Return the tensors that a kernel loops over in tiles of `rows`: as descriptors if it loads by TMA."""
    return tuple(_descriptor(x, rows) for x in tensors) if call.tma else tensors


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    if not _fits_descriptor(x):
        x = x.clone(memory_format=torch.contiguous_format)
    heads_first = x.transpose(1, 2)
    # The stride of a dimension of size 1 is never used, but CUDA refuses one that is no multiple of 16 bytes.
    strides = [x.shape[-1] if n == 1 else s for n, s in zip(heads_first.shape, heads_first.stride(), strict=True)]
    return TensorDescriptor(heads_first, list(heads_first.shape), [*strides[:3], 1], [1, 1, rows, x.shape[-1]])


def _fits_descriptor(x: Tensor) -> bool:
    """Say whether base and strides are multiples of 16 bytes (CUDA driver API, cuTensorMapEncodeTiled)."""
    used = [s * x.element_size() for n, s in zip(x.shape[:3], x.stride()[:3], strict=True) if n > 1]
    return x.data_ptr() % 16 == 0 and all(s and s % 16 == 0 for s in used)


def _rows_of_vectors(x: Tensor) -> Tensor:
    """Return `x` with stride 1 along head_dim, which the kernels assume; they take all other strides as arguments."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(s for x in tensors for s in x.stride()[:3])


def _precision(dtype: torch.dtype) -> str:
    """Return Triton's input precision: float32 products are three tf32 products, with nearly the error of float32.

    They are one tf32 product where torch's switch for matrix products allows it. 16-bit operands ignore the setting.
    """
    allowed = dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "tf32x3"


@functools.cache
def _has_tma(device: torch.device) -> bool:
    return device.type == "cuda" and uses_tma(torch.cuda.get_device_capability(device))


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
