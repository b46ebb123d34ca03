"""Compute attention of noisy and clean rows in training, and of a block in decoding: the public functions of attention.

Legend: B batch, L data tokens a sequence, R query positions (L, or fewer on a context-parallel rank), C noisy copies,
H query heads, G key/value heads, D head size, Q queries, S keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from bd3_scale.attention import ops  # noqa: F401  (its operators are there before torch.compile looks at a call)
from bd3_scale.attention.backends import Backend, choose_backend
from bd3_scale.attention.checks import check_block_arguments, check_decode_arguments
from bd3_scale.registry import attention_backends

Decoder = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor,
    *,
    num_noisy: int = 1,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute attention over noisy and clean rows under the block diffusion mask of `spans`.

    A clean query sees the clean keys [doc_start, block_end) of its position. A noisy query sees the clean keys
    [doc_start, block_start) and the keys of its own block in its own noisy copy. The shapes decide which rows and keys
    there are. H is a multiple of G (grouped-query attention); keys are not repeated for the query heads of a group.

    Args:
        q: [B, C·R + R, H, D], C noisy copies one after the other and then the clean rows, at the same R positions; or
            [B, C·R, H, D] where nothing reads the clean output (the last layer).
        k, v: [B, C·R + L, G, D], the noisy rows and then the clean keys of the whole sequence; or [B, C·R, G, D]
            without a clean stream, where every document is one block (MDLM).
        spans: int32 [3, B, L] of `make_spans` (then R = L), or int32 [5, B, R] of `take_ranges` for the rows of a
            context-parallel rank. Their values are checked on CPU; elsewhere that would wait for the device.
        num_noisy: C; 0 for clean rows alone (prefill).
        scale: factor on the scores, positive; default 1/√D.
        backend: see `choose_backend`. On a GPU the backward is bitwise reproducible where
            `torch.use_deterministic_algorithms` asks for it, and faster where it does not.

    Returns [B, rows of q, H, D] in the dtype of q; a row that sees nothing is zero.
    ValueError: arguments that do not fit together, by name.
    """
    scale = _default_scale(q) if scale is None else scale
    check_block_arguments(q, k, v, spans, num_noisy, scale)
    return _backend(backend, q).block_attention(q, k, v, spans, num_noisy, scale)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute attention of a block's queries over the cached prefix and the block itself; no mask, no gradients.

    A block sees its whole prefix and itself, so decoding needs no mask.

    q: [B, Q, H, D]; k and v: [B, S, G, D], the prefix followed by the block; lengths: integers [B], the keys
    [0, lengths) that each sequence sees, where prefixes differ (default: all S); scale and backend as for
    `block_attention`. Returns [B, Q, H, D].
    """
    scale = _default_scale(q) if scale is None else scale
    check_decode_arguments(q, k, v, lengths, scale)
    return _backend(backend, q).decode_attention(q, k, v, lengths, scale)


def decoder(backend: str, device: torch.device, dtype: torch.dtype, head_size: int) -> Decoder:
    """Return `decode_attention` as a function of q, k, v, lengths and scale, for one device, dtype and head size.

    It neither checks arguments nor chooses a backend at each call: a pass of a small model is so short that both would
    take a noticeable share of it.
    """
    chosen = cast(Backend, attention_backends.get(choose_backend(backend, device, dtype, head_size))())
    return chosen.decode_attention


def _backend(requested: str, q: Tensor) -> Backend:
    return cast(Backend, attention_backends.get(choose_backend(requested, q.device, q.dtype, q.shape[-1]))())


def _default_scale(q: Tensor) -> float:
    if q.ndim != 4 or q.shape[-1] == 0:
        raise ValueError(
            f"q has shape {tuple(q.shape)}: [batch, rows, heads, head_dim] is needed, none of them missing"
        )
    return float(q.shape[-1] ** -0.5)
