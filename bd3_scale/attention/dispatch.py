"""Attention of the noisy and the clean stream, and of a block being decoded: the public face of the room.

Legend: B batch, L data tokens a sequence, H query heads, G key/value heads, D head size, Q queries, S keys, N = Q·H/G.
"""

from __future__ import annotations

import functools
import warnings
from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from bd3_scale.attention.cpu import chunked_attention
from bd3_scale.attention.reference import reference_attention

Backend = Literal["auto", "reference", "cpu"]


class QKV(NamedTuple):
    """One stream: q [B, L, H, D] (None: its queries are not needed), k and v [B, L, G, D], with G dividing H."""

    q: Tensor | None
    k: Tensor
    v: Tensor


def block_attention(
    noisy: QKV | None, clean: QKV | None, spans: Tensor, *, scale: float | None = None, backend: Backend = "auto"
) -> tuple[Tensor | None, Tensor | None]:
    """Attention under the block diffusion mask of `spans` (int32 [3, B, L], see `make_spans`).

    A clean query sees the clean keys [doc_start, block_end); a noisy query sees the clean keys [doc_start, block_start)
    and the noisy keys [block_start, block_end). `clean.q` is None where nothing reads the clean output (last layer),
    `noisy` is None in prefill, `clean` is None where every document is one block, so that no clean key is seen.
    scale: factor on the scores; default 1/√D. Returns (noisy, clean) outputs [B, L, H, D], None without queries.
    ValueError: shapes, heads, dtypes or devices that do not fit together.
    """
    _check(noisy, clean, spans)
    k = noisy.k if noisy is not None else clean.k  # type: ignore[union-attr]
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    if backend == "auto":
        backend = "cpu" if k.device.type == "cpu" else "reference"
        if backend == "reference":
            _warn_no_kernel(k.device.type)
    attention = {"cpu": chunked_attention, "reference": reference_attention}[backend]
    return attention(noisy, clean, spans, scale)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
    """Attention of a block's queries over the cached prefix and the block itself: every key is seen.

    q: [B, Q, H, D]; k and v: [B, S, G, D], the prefix followed by the block; key_mask: bool [B, S], False at the keys
    that only pad a shorter prefix. Returns [B, Q, H, D].
    """
    num_queries, num_heads, num_groups = q.shape[1], q.shape[2], k.shape[2]
    # The query heads of a group become rows: no key is repeated, and any kernel takes it.
    q_BGND = q.unflatten(2, (num_groups, num_heads // num_groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    mask = None if key_mask is None else key_mask[:, None, None]
    out_BGND = F.scaled_dot_product_attention(q_BGND, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out_BGND.unflatten(2, (-1, num_queries)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _check(noisy: QKV | None, clean: QKV | None, spans: Tensor) -> None:
    streams = {name: stream for name, stream in (("noisy", noisy), ("clean", clean)) if stream is not None}
    if noisy is not None and noisy.q is None:
        raise ValueError("noisy.q is None: leave out the noisy stream altogether where nothing reads it")
    if all(stream.q is None for stream in streams.values()):
        raise ValueError("neither noisy nor clean has queries: give at least one")
    tensors = {
        f"{name}.{part}": tensor
        for name, stream in streams.items()
        for part, tensor in stream._asdict().items()
        if tensor is not None
    }
    first_name, first = next((name, tensor) for name, tensor in tensors.items() if name.endswith(".k"))
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if tensor.ndim != 4:
            raise ValueError(f"{name} has shape {shape}: [batch, seq_len, heads, head_dim] is needed")
        if (tensor.dtype, tensor.device) != (first.dtype, first.device):
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, {first_name} {first.dtype} on {first.device}: "
                "they must agree"
            )
        fits = [a == b for a, b in zip(shape, first.shape, strict=True)]
        fits[2] = shape[2] % first.shape[2] == 0 if name.endswith(".q") else fits[2]
        if not all(fits):
            raise ValueError(
                f"{name} has shape {shape}, {first_name} {tuple(first.shape)}: batch, seq_len and head_dim must agree, "
                "keys and values have equal heads, which divide the query heads"
            )
    if spans.shape != (3, *first.shape[:2]):
        raise ValueError(f"spans has shape {tuple(spans.shape)}: {(3, *first.shape[:2])} is needed; see make_spans")


@functools.cache
def _warn_no_kernel(device: str) -> None:
    warnings.warn(f"no fused block attention for {device}: the dense reference runs, slow and large", stacklevel=3)
