"""Split a product into queries, keys and values, and apply the norms of heads and the rotary position embedding.

Legend: N rows of B sequences; G key/value heads, q query heads for each of them, D dimensions a head. The heads of a
key/value group are neighbours: its queries, its key, its value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bd3_scale.fused import ops
from bd3_scale.fused.norm import norm_backward, norm_forward, norm_scale


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

    Queries and keys are RMS-normed where weights [D] are given, both or neither, and rotated by `rotate`. Values are
    unchanged and may be a view of qkv: do not write to them.

    num_queries: q; with 0 the queries are empty.
    cos, sin: [N, B, D], see `rotate`.
    """
    needed = (qkv, q_weight, k_weight)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in needed):
        return _QKVHeads.apply(qkv, num_queries, q_weight, k_weight, cos, sin, eps)
    return _forward(qkv, num_queries, q_weight, k_weight, cos, sin, eps)


def qkv_heads_(
    qkv: Tensor, num_queries: int, weight: Tensor | None, rotary: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `qkv_heads` in the memory of qkv, without gradients.

    Queries and keys are processed together, in half as many operators: the time of a decoding pass depends on the
    number of operators.

    weight: [q + 1, D], the norm weights of a group's queries and of its key; rotary: cos and sin [2, N, B, D].
    """
    _, rows, batch, size = rotary.shape
    if ops.kernels_take(qkv, head=size):
        q_weight, k_weight = (None, None) if weight is None else (weight[0], weight[-1])
        return qkv_heads(qkv, num_queries, q_weight, k_weight, rotary[0], rotary[1], eps)
    heads = qkv.view(rows, batch, -1, num_queries + 2, size)
    rotated = heads.narrow(3, 0, num_queries + 1)
    cos, sin = rotary.view(2, rows, batch, 1, 1, size).unbind()
    rotate(rotated if weight is None else norm_forward(rotated, weight, eps)[0], cos, sin, rotated)
    query = heads.select(3, 0) if num_queries == 1 else heads.narrow(3, 0, num_queries).flatten(2, 3)
    return query, heads.select(3, num_queries), heads.select(3, num_queries + 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
    """Rotate the pairs (i, i + D/2) of heads x [..., D]: RoPE (Su et al., 2021), half-split as in Llama and Qwen.

    cos, sin: broadcast to x; the sines of the first half are negative. out: the tensor to write the result into.
    """
    # (low, high) ↦ (low · cos − high · sin, high · cos + low · sin): x · cos + (high, low) · (−sin, sin), with the
    # signs already in the table. `roll` makes the new tensor (high, low), and the other two operators work in place.
    # The number of operators determines the time of a small decoded block.
    turned = x.roll(x.shape[-1] // 2, -1).mul_(sin)
    return turned.addcmul_(x, cos) if out is None else torch.addcmul(turned, x, cos, out=out)


class _QKVHeads(torch.autograd.Function):
    """`qkv_heads` with a backward that computes the norms again and writes the gradient of all heads once.

    Autograd's own backward would make a gradient of the size of qkv for each of the three outputs, and add them.
    """

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
        # Without norms the gradient of qkv does not depend on qkv, so it is not kept.
        ctx.save_for_backward(None if q_weight is None else qkv, q_weight, k_weight, cos, sin)
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
    value = value.squeeze(-2)
    if ops.kernels_take(qkv, head=size):
        query, key = ops.qkv_heads(qkv, num_queries, q_weight, k_weight, cos, sin, eps)
        # Without norms nothing needs qkv any more, but a view of it would keep all of it in the GPU's memory.
        return query, key, value.contiguous() if q_weight is None else value
    if q_weight is not None and k_weight is not None:
        query, key = norm_forward(query, q_weight, eps)[0], norm_forward(key, k_weight, eps)[0]
    cos, sin = cos[:, :, None, None], sin[:, :, None, None]
    return rotate(query, cos, sin).flatten(2, 3), rotate(key, cos, sin).squeeze(-2), value


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
    if ops.kernels_take(grad_key, head=size):
        grad, sums = ops.qkv_heads_backward(
            grad_query, grad_key, grad_value, qkv, num_queries, q_weight, k_weight, cos, sin, eps
        )
        if q_weight is None:
            return grad, None, None
        q_grad, k_grad = sums.sum(0)
        return grad, q_grad, k_grad
    shape = (groups, num_queries + 2, size)
    grad = grad_key.new_empty((*grad_key.shape[:2], *shape))
    of_query, of_key, of_value = grad.split([num_queries, 1, 1], dim=-2)
    of_value.copy_(grad_value[:, :, :, None])
    grads = (grad_query.unflatten(2, (groups, num_queries)), grad_key[:, :, :, None])
    # The gradient of a rotation is the rotation by the opposite angle.
    cos, sin = cos[:, :, None, None], -sin[:, :, None, None]
    if qkv is None or q_weight is None or k_weight is None:
        for gradient, out in zip(grads, (of_query, of_key), strict=True):
            rotate(gradient, cos, sin, out)
        return grad.flatten(2), None, None
    query, key, _ = qkv.unflatten(-1, shape).split([num_queries, 1, 1], dim=-2)
    turned_query, turned_key = (rotate(x, cos, sin) for x in grads)
    _, q_grad = norm_backward(turned_query, query, q_weight, norm_scale(query, eps), of_query)
    _, k_grad = norm_backward(turned_key, key, k_weight, norm_scale(key, eps), of_key)
    return grad.flatten(2), q_grad, k_grad
