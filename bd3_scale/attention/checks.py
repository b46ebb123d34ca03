"""Check the arguments of attention calls; each error names the argument."""

from __future__ import annotations

import torch
from torch import Tensor


def check_block_arguments(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, num_noisy: int, scale: float) -> None:
    """Raise ValueError unless `block_attention` can take these; reads shapes, dtypes and devices, never values.

    Reading a value of a tensor on a GPU would make the host wait for it, in every layer.
    """
    _check_qkv(q, k, v, scale)
    if spans.ndim != 3 or spans.shape[0] not in (3, 5) or spans.shape[1] != q.shape[0]:
        raise ValueError(
            f"spans has shape {tuple(spans.shape)}: [3, {q.shape[0]}, seq_len] is needed, see make_spans, "
            f"or [5, {q.shape[0]}, rows] of a context-parallel rank, see take_ranges"
        )
    if spans.dtype != torch.int32:
        raise ValueError(f"spans is {spans.dtype}: torch.int32 is needed, see make_spans")
    if spans.device != q.device:
        raise ValueError(f"spans is on {spans.device}, q on {q.device}: they must agree")
    num_rows = spans.shape[2]
    if num_noisy < 0:
        raise ValueError(f"num_noisy is {num_noisy}: give the number of noisy copies, 0 or more")
    noisy_rows = num_noisy * num_rows
    # Compare lengths by operators alone. `torch.compile` turns a length that is looked up in a set or tuple into a
    # constant, and compiles another graph for each further length.
    if q.shape[1] != noisy_rows + num_rows and (num_noisy == 0 or q.shape[1] != noisy_rows):
        allowed = f"{noisy_rows} or {noisy_rows + num_rows}" if num_noisy else f"{num_rows}"
        raise ValueError(
            f"q has {q.shape[1]} rows: {allowed} are needed for num_noisy={num_noisy} noisy copies of {num_rows} "
            "positions, with or without the clean queries after them"
        )
    num_keys = k.shape[1] - noisy_rows
    # Clean rows need at least one clean key. An int, because `torch.compile` fails to compare a symbolic length with a
    # boolean.
    fewest = 1 if q.shape[1] > noisy_rows else 0
    whole = spans.shape[0] == 3
    if num_keys != num_rows if whole and (num_keys or fewest) else num_keys < fewest:
        raise ValueError(
            f"k has {k.shape[1]} rows: {num_noisy}·{num_rows} noisy rows and "
            f"{num_rows if whole else 'the whole sequence of'} clean rows are needed"
        )


def check_decode_arguments(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float) -> None:
    """Raise ValueError unless `decode_attention` can take these; reads shapes, dtypes and devices, never values."""
    _check_qkv(q, k, v, scale)
    if lengths is None:
        return
    if lengths.shape != q.shape[:1] or lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"lengths has shape {tuple(lengths.shape)} and dtype {lengths.dtype}: integers [{q.shape[0]}] are needed, "
            "the number of keys that each sequence sees"
        )
    if lengths.device != q.device:
        raise ValueError(f"lengths is on {lengths.device}, q on {q.device}: they must agree")


def _check_qkv(q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    for name, x in {"q": q, "k": k, "v": v}.items():
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: [batch, rows, heads, head_dim] is needed")
        if not x.is_floating_point():
            raise ValueError(f"{name} is {x.dtype}: a floating-point dtype is needed")
        if (x.dtype, x.device) != (q.dtype, q.device):
            raise ValueError(f"{name} is {x.dtype} on {x.device}, q {q.dtype} on {q.device}: they must agree")
        if (x.shape[0], x.shape[3]) != (q.shape[0], q.shape[3]):
            raise ValueError(f"{name} has shape {tuple(x.shape)}, q {tuple(q.shape)}: batch and head_dim must agree")
    if v.shape != k.shape:
        raise ValueError(f"v has shape {tuple(v.shape)}, k {tuple(k.shape)}: they must be equal")
    if k.shape[2] == 0 or q.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"k has {k.shape[2]} heads and q {q.shape[2]}: the key/value heads must divide the query heads"
        )
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale is {scale}: a positive, finite factor is needed")
