"""Register the kernels as torch operators, which a trace can see, with the bytes that each reads and writes.

Liger Kernel 0.8.5 does not fit here: its kernels are not operators of torch.library, none splits q, k and v, its SwiGLU
takes two tensors where ours is one product, and its vocabulary-parallel cross-entropy writes fp32 exponentials in
addition to the logits.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bd3_scale.fused.kernels.tiles import head_tile, norm_tile, programs

# `plain` disables the kernels: for comparisons, or where a GPU, driver or Triton version cannot run them.
ENVIRONMENT = "BD3_SCALE_FUSED"
# Read once, at import, because Triton reads its variable once.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WIDEST_NORM = 16_384
HEAD_SIZES = range(16, 257, 2)

_NUMBERS = (torch.float16, torch.bfloat16, torch.float32)


def kernels_take(x: Tensor, *, norm: int = 1, head: int = HEAD_SIZES[0]) -> bool:
    """Say whether the kernels take tensors like x: fp16, bf16 or fp32 on CUDA, or in Triton's interpreter.

    norm: number of channels that are normed, at most WIDEST_NORM; head: dimensions of a head, one of HEAD_SIZES.
    Otherwise plain PyTorch computes.
    """
    if not (x.device.type == "cuda" or INTERPRETED) or x.dtype not in _NUMBERS:
        return False
    return norm <= WIDEST_NORM and head in HEAD_SIZES and not are_disabled()


def are_disabled() -> bool:
    """Say whether $BD3_SCALE_FUSED disables the kernels. ValueError: it has another value than `plain`."""
    value = os.environ.get(ENVIRONMENT, "")
    if value not in ("", "plain"):
        raise ValueError(f"${ENVIRONMENT} is {value!r}: set it to 'plain' to disable the kernels, or leave it out")
    return value == "plain"


def _launch() -> Any:
    from bd3_scale.fused.kernels import launch

    return launch


def _define(schema: str) -> Any:
    """Define an operator that calls the function of the same name in `kernels.launch`.

    Not by `custom_op`: its layers (autograd, alias checks) take longer than a small kernel.
    """
    name = schema.partition("(")[0]
    torch.library.define(f"bd3_scale::{name}", schema.removeprefix(name))

    @torch.library.impl(f"bd3_scale::{name}", ["CPU", "CUDA"])
    def run(*args: Any) -> Any:
        return getattr(_launch(), name)(*args)

    return getattr(torch.ops.bd3_scale, name).default


swiglu = _define("swiglu(Tensor x) -> Tensor")
swiglu_backward = _define("swiglu_backward(Tensor grad, Tensor x) -> (Tensor, Tensor)")
add_rms_norm = _define("add_rms_norm(Tensor x, Tensor? more, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)")
add_rms_norm_backward = _define(
    "add_rms_norm_backward(Tensor? grad_total, Tensor grad_normed, Tensor total, Tensor weight, Tensor scale) "
    "-> (Tensor, Tensor)"
)
qkv_heads = _define(
    "qkv_heads(Tensor qkv, int num_queries, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, float eps) "
    "-> (Tensor, Tensor)"
)
qkv_heads_backward = _define(
    "qkv_heads_backward(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor? qkv, int num_queries, "
    "Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, float eps) -> (Tensor, Tensor)"
)
row_statistics = _define("row_statistics(Tensor logits, Tensor targets, int first_id, Tensor forbidden) -> Tensor")
logit_gradient_ = _define(
    "logit_gradient_(Tensor(a!) logits, Tensor targets, int first_id, Tensor forbidden, Tensor log_total, "
    "Tensor softmax_scale, Tensor target_scale) -> ()"
)


@torch.library.register_fake("bd3_scale::swiglu")
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@torch.library.register_fake("bd3_scale::swiglu_backward")
def _(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(grad.shape)


@torch.library.register_fake("bd3_scale::add_rms_norm")
def _(x: Tensor, more: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    total = x.new_empty(0 if more is None else x.shape)
    return total, x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@torch.library.register_fake("bd3_scale::add_rms_norm_backward")
def _(
    grad_total: Tensor | None, grad_normed: Tensor, total: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    size = total.shape[-1]
    count, _ = programs(total.shape[:-1].numel(), norm_tile(size).rows)
    return total.new_empty(total.shape), total.new_empty((count, size), dtype=torch.float32)


@torch.library.register_fake("bd3_scale::qkv_heads")
def _(qkv: Tensor, num_queries: int, q_weight: Any, k_weight: Any, cos: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    size = cos.shape[-1]
    groups = qkv.shape[-1] // ((num_queries + 2) * size)
    return (
        qkv.new_empty((*qkv.shape[:-1], groups * num_queries, size)),
        qkv.new_empty((*qkv.shape[:-1], groups, size)),
    )


@torch.library.register_fake("bd3_scale::qkv_heads_backward")
def _(
    grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, qkv: Tensor | None, num_queries: int, *_: Any
) -> tuple[Tensor, Tensor]:
    groups, size = grad_key.shape[-2:]
    heads = groups * (num_queries + 2)
    grad = grad_key.new_empty((*grad_key.shape[:-2], heads * size))
    count, _tiles = programs(grad.shape[:-1].numel() * heads, head_tile(size).heads)
    return grad, grad.new_empty((0 if qkv is None else count, 2, size), dtype=torch.float32)


@torch.library.register_fake("bd3_scale::row_statistics")
def _(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty((3, logits.shape[0]), dtype=torch.float32)


@torch.library.register_fake("bd3_scale::logit_gradient_")
def _(*_: Any) -> None:
    return None


def _size(*tensors: Tensor | None) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def _swiglu_bytes(x: Tensor) -> int:
    return _size(x) * 3 // 2


def _swiglu_backward_bytes(grad: Tensor, x: Tensor) -> int:
    return 2 * _size(grad, x)


def _add_rms_norm_bytes(x: Tensor, more: Tensor | None, weight: Tensor, eps: float) -> int:
    return 2 * _size(x, more) + _size(weight) + 4 * x.shape[:-1].numel()


def _add_rms_norm_backward_bytes(
    grad_total: Tensor | None, grad_normed: Tensor, total: Tensor, weight: Tensor, scale: Tensor
) -> int:
    count, _ = programs(total.shape[:-1].numel(), norm_tile(total.shape[-1]).rows)
    return _size(grad_total, grad_normed, total, weight, scale, total) + 4 * count * total.shape[-1]


def _qkv_heads_bytes(
    qkv: Tensor,
    num_queries: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> int:
    """Count the bytes of `qkv_heads`; values are neither read nor written."""
    return 2 * _size(qkv) * (num_queries + 1) // (num_queries + 2) + _size(q_weight, k_weight, cos, sin)


def _qkv_heads_backward_bytes(
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
) -> int:
    moved = 2 * _size(grad_query, grad_key, grad_value) + _size(q_weight, k_weight, cos, sin)
    if qkv is not None:
        heads = qkv.numel() // cos.shape[-1]
        count, _ = programs(heads, head_tile(cos.shape[-1]).heads)
        moved += _size(qkv) * (num_queries + 1) // (num_queries + 2) + 4 * count * 2 * cos.shape[-1]
    return moved


def _row_statistics_bytes(logits: Tensor, targets: Tensor, first_id: int, forbidden: Tensor) -> int:
    return _size(logits, targets, forbidden) + 4 * 3 * len(logits)


def _logit_gradient_bytes(logits: Tensor, targets: Tensor, first_id: int, forbidden: Tensor, *of_rows: Tensor) -> int:
    return _size(logits, logits, targets, forbidden, *of_rows)


# For each operator, a function of its arguments that returns the bytes that its kernel reads and writes.
TRAFFIC: dict[str, Callable[..., int]] = {
    "swiglu": _swiglu_bytes,
    "swiglu_backward": _swiglu_backward_bytes,
    "add_rms_norm": _add_rms_norm_bytes,
    "add_rms_norm_backward": _add_rms_norm_backward_bytes,
    "qkv_heads": _qkv_heads_bytes,
    "qkv_heads_backward": _qkv_heads_backward_bytes,
    "row_statistics": _row_statistics_bytes,
    "logit_gradient_": _logit_gradient_bytes,
}
