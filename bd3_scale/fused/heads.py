"""Queries, keys and values of a product, normed and turned by their positions.

Legend: N rows of B sequences; G key/value heads, q query heads for each of them, D dimensions a head. Heads of a
key/value group stand together: its queries, its key, its value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bd3_scale.fused.norm import norm_backward, norm_forward


def qkv_heads(
    qkv: Tensor,
    num_queries: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries [N, B, G·q, D], keys and values [N, B, G, D] of `qkv` [N, B, G·(q+2)·D].

    Queries and keys are RMS-normed where there are weights [D], and turned by `rotate`. Values, which nothing changes,
    are a view of qkv where backward keeps that anyway.

    num_queries: q; with 0 the queries are empty.
    cos, sin: [N, B, D], see `rotate`.
    """
    needed = (qkv, q_weight, k_weight)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in needed):
        return _QKVHeads.apply(qkv, num_queries, q_weight, k_weight, cos, sin, eps)
    return _forward(qkv, num_queries, q_weight, k_weight, cos, sin, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) of heads x [..., D]: half-split, as in Llama and Qwen (Su et al., 2021).

    cos, sin: broadcast to x; the sines of the first half are negative.
    """
    # (low, high) ↦ (low · cos − high · sin, high · cos + low · sin), since the table's sines of the first half are
    # negative. `roll` gives a new tensor, (high, low), which the others change in place: a decoded block is so small
    # that the number of operators is what it costs.
    return x.roll(x.shape[-1] // 2, -1).mul_(sin).addcmul_(x, cos)


class _QKVHeads(torch.autograd.Function):
    """Its backward norms again and writes the gradient of all heads once; autograd's own would add up parts of it."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        num_queries: int,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.num_queries, ctx.eps = num_queries, eps
        # Without norms the gradient of qkv does not depend on qkv, which then is not kept.
        normed = q_weight is not None or k_weight is not None
        ctx.save_for_backward(qkv if normed else None, q_weight, k_weight, cos, sin)
        return _forward(qkv, num_queries, q_weight, k_weight, cos, sin, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_query, grad_key, grad_value = grads
        qkv, q_weight, k_weight, cos, sin = ctx.saved_tensors
        grad_qkv, q_grad, k_grad = _backward(
            grad_query, grad_key, grad_value, ctx.num_queries, qkv, q_weight, k_weight, cos, sin, ctx.eps
        )
        return grad_qkv, None, q_grad, k_grad, None, None, None


def _forward(
    qkv: Tensor,
    num_queries: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    size = cos.shape[-1]
    heads = qkv.unflatten(-1, (-1, num_queries + 2, size))
    query, key, value = heads.split([num_queries, 1, 1], dim=-2)  # [N, B, G, q or 1, D]
    if q_weight is not None:
        query = norm_forward(query, q_weight, eps)[0]
    if k_weight is not None:
        key = norm_forward(key, k_weight, eps)[0]
    cos, sin = cos[:, :, None, None], sin[:, :, None, None]
    value = value.squeeze(-2)
    normed = q_weight is not None or k_weight is not None
    return (
        rotate(query, cos, sin).flatten(2, 3),
        rotate(key, cos, sin).squeeze(-2),
        value if normed else value.clone(memory_format=torch.contiguous_format),
    )


def _backward(
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    num_queries: int,
    qkv: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    groups, size = grad_key.shape[-2:]
    shape = (*grad_key.shape[:2], groups, num_queries + 2, size)
    grad = grad_key.new_empty(shape)
    parts = grad.split([num_queries, 1, 1], dim=-2)
    cos, sin = cos[:, :, None, None], sin[:, :, None, None]
    turned = [
        rotate(grad_query.unflatten(2, (groups, num_queries)), cos, -sin),
        rotate(grad_key.unsqueeze(-2), cos, -sin),
    ]
    weight_grads: list[Tensor | None] = [None, None]
    for i, weight in enumerate((q_weight, k_weight)):
        if weight is not None:
            assert qkv is not None
            x = qkv.unflatten(-1, shape[2:]).split([num_queries, 1, 1], dim=-2)[i]
            scale = norm_forward(x, weight, eps)[1]
            turned[i], weight_grads[i] = norm_backward(turned[i], x, weight, scale)
        parts[i].copy_(turned[i])
    parts[2].copy_(grad_value.unsqueeze(-2))
    return grad.flatten(2), weight_grads[0], weight_grads[1]
