"""Register attention as torch operators, which `torch.compile`, activation recomputation and FLOP counting can see.

`bd3_scale::block_attention` and its backward call the backends with a backward of their own (`KernelBackend`s);
`bd3_scale::decode_attention` has no backward. Shapes are those of `bd3_scale.attention.dispatch`. `lse` is the
log-sum-exp of the scaled scores, float32 [B, H, rows]: the backward recomputes the softmax weights from it instead of
storing them (FlashAttention-2, Dao, 2023). Its base, e or 2, is the backend's own choice.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils.flop_counter import register_flop_formula

from bd3_scale.attention.spans import check_spans, count_pairs, own_block
from bd3_scale.registry import attention_backends


def _kernels(name: str) -> Any:
    return attention_backends.get(name)().kernels()


def noisy_rows_as_documents(spans: Tensor, num_noisy: int) -> Tensor:
    """Return the spans that describe C noisy copies without a clean stream as C·R clean rows, copy after copy.

    Such a row sees its own block only, as a clean row does whose document is its block. The kernels therefore need no
    third form of call.
    """
    own_start, own_end = own_block(spans)
    num_rows = spans.shape[2]
    documents = torch.stack([own_start, own_start, own_end])
    return torch.cat([documents + copy * num_rows for copy in range(num_noisy)], 2)


# `torch.library.define` in place of `custom_op`: the latter's layers (dynamo, alias checks) take longer than the
# attention of a small block.
for _signature in (
    "block_attention(Tensor q, Tensor k, Tensor v, Tensor spans, int num_noisy, float scale, str backend)"
    " -> (Tensor, Tensor)",
    "block_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor spans,"
    " int num_noisy, float scale, str backend, bool deterministic) -> (Tensor, Tensor, Tensor)",
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor? lengths, float scale, str backend) -> Tensor",
):
    _name, _parenthesis, _rest = _signature.partition("(")
    torch.library.define(f"bd3_scale::{_name}", _parenthesis + _rest)

# The spans that were checked last. All layers of a pass have the same ones, and comparing is cheaper than checking.
_checked: list[tuple[Tensor, int]] = []


def _check(spans: Tensor, num_keys: int) -> None:
    if _checked:
        known, keys = _checked[0]
        if keys == num_keys and known.shape == spans.shape and torch.equal(known, spans):
            return
    check_spans(spans, num_keys=num_keys)
    _checked[:] = [(spans.clone(), num_keys)]


@torch.library.impl("bd3_scale::block_attention", ["CPU", "CUDA"])
def _block_attention(
    q: Tensor, k: Tensor, v: Tensor, spans: Tensor, num_noisy: int, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    if spans.device.type == "cpu":
        _check(spans, k.shape[1] - num_noisy * spans.shape[2])
    if q.numel() == 0:
        return _like(q), _lse_like(q)
    return cast(tuple[Tensor, Tensor], _kernels(backend).forward(q, k, v, spans, num_noisy, scale))


@torch.library.impl("bd3_scale::block_attention_backward", ["CPU", "CUDA"])
def _block_attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *saved, backend, deterministic = rest
    if q.numel() == 0:
        return _like(q), _like(k).zero_(), _like(v).zero_()
    grads = _kernels(backend).backward(grad_out, q, k, v, *saved, deterministic)
    return cast(tuple[Tensor, Tensor, Tensor], grads)


block_attention = torch.ops.bd3_scale.block_attention.default
block_attention_backward = torch.ops.bd3_scale.block_attention_backward.default


@torch.library.impl("bd3_scale::decode_attention", ["CPU", "CUDA"])
def _decode_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, backend: str) -> Tensor:
    if q.numel() == 0:
        return q.new_empty(q.shape)
    return cast(Tensor, _kernels(backend).decode(q, k, v, lengths, scale).contiguous())


decode_attention = torch.ops.bd3_scale.decode_attention.default


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _lse_like(q: Tensor) -> Tensor:
    batch, rows, heads, _ = q.shape
    return q.new_empty((batch, heads, rows), dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.register_fake("bd3_scale::block_attention")
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _like(q), _lse_like(q)


@torch.library.register_fake("bd3_scale::block_attention_backward")
def _(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v)


@torch.library.register_fake("bd3_scale::decode_attention")
def _(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, spans, ctx.num_noisy, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, *output, spans)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 7
    deterministic = torch.are_deterministic_algorithms_enabled()
    grads = block_attention_backward(grad_out, *ctx.saved_tensors, ctx.num_noisy, ctx.scale, ctx.backend, deterministic)
    return (*grads, None, None, None, None)


torch.library.register_autograd("bd3_scale::block_attention", _differentiate, setup_context=_save)


def _pairs(q: Tensor, k: Tensor, spans: Tensor, num_noisy: int) -> int:
    """Count query-key pairs over all heads; for a fake `spans`, which has no values, the most that its shape allows."""
    num_rows = spans.shape[2]
    if isinstance(spans, torch._subclasses.FakeTensor) or spans.is_meta:
        noisy_rows = num_noisy * num_rows
        most = q.shape[0] * (q.shape[1] * (k.shape[1] - noisy_rows) + noisy_rows * num_rows)
        return most * q.shape[2]
    # Real spans may come with fake tensors (memory planning); under the fake mode their values could not be read.
    with unset_fake_temporarily():
        return q.shape[2] * count_pairs(spans, num_noisy=num_noisy, clean_queries=q.shape[1] > num_noisy * num_rows)


@register_flop_formula(torch.ops.bd3_scale.block_attention, get_raw=True)
def _forward_flops(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, num_noisy: int, *_: Any, **__: Any) -> int:
    """Count two matrix products over the pairs that the mask allows: Q·Kᵀ and P·V, 2·D FLOPs a pair each."""
    return 4 * q.shape[3] * _pairs(q, k, spans, num_noisy)


@register_flop_formula(torch.ops.bd3_scale.block_attention_backward, get_raw=True)
def _backward_flops(grad_out: Tensor, q: Tensor, k: Tensor, *rest: Any, **_: Any) -> int:
    """Count five matrix products over the pairs that the mask allows.

    The scores once more, and the gradients of v, of the weights, of q and of k (FlashAttention-2, algorithm 2).
    """
    spans, num_noisy = rest[3:5]  # after v, out and lse
    return 10 * q.shape[3] * _pairs(q, k, spans, num_noisy)


@register_flop_formula(torch.ops.bd3_scale.decode_attention, get_raw=True)
def _decode_flops(q: Tensor, k: Tensor, *_: Any, **__: Any) -> int:
    return 4 * q.numel() * k.shape[1]
