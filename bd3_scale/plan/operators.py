"""Read off an operator's call what its kernel computes and moves, and whether it is waited for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor

from bd3_scale.fused.ops import TRAFFIC

_ONLY_WRITES = {"copy_", "zero_", "fill_"}


def moved_bytes(func: Any, args: Any, kwargs: Any, after: list[Tensor], device_type: str) -> int:
    """Return the bytes that a kernel reads and writes on a device; a tensor changed in place is both read and written.

    after: the tensors that it returns. Our own kernels have formulas of their own, see `bd3_scale.fused.ops`.
    """
    name = func._schema.name.partition("::")[2]
    if name in TRAFFIC:
        return TRAFFIC[name](*args)
    read: dict[int, Tensor] = {}
    written = {id(x): x for x in after}
    for index, argument in enumerate(func._schema.arguments):
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        tensors = {id(x): x for x in pytree.tree_leaves(value) if isinstance(x, Tensor)}
        changed = argument.alias_info is not None and argument.alias_info.is_write
        if not (changed and (argument.is_out or name in _ONLY_WRITES)):
            read |= tensors
        written |= tensors if changed else {}
    both = (*read.values(), *written.values())
    moved = sum(_size(x) for x in both if x.device.type == device_type)
    # A gather reads a row as often as it returns it.
    return moved + (max(0, _size(after[0]) - _size(args[0])) if name == "index" else 0)


def flops_and_shape(
    name: str, args: Any, before: list[Tensor], after: list[Tensor], pairs: Mapping[int, int]
) -> tuple[int, str]:
    """Return the floating-point operations of a matrix product or an attention, and its shape; 0 and "" for others.

    before, after: tensors among its arguments, and what it returns; pairs: see `Recorder`.
    """
    if name in ("mm", "addmm", "bmm", "baddbmm"):
        inner = args[1 if "add" in name else 0].shape[-1]
        out = after[0]
        return 2 * out.numel() * inner, "x".join(map(str, (*out.shape, inner)))
    if name == "_grouped_mm":
        # Rows [M, K] by the weights of their experts [e, K, N], or, for the weights' gradients, [N, M] by [M, K].
        rows, other = args[:2]
        return 2 * rows.numel() * other.shape[-1], "x".join(map(str, (*rows.shape, *other.shape)))
    if name in ("block_attention", "block_attention_backward"):
        q = before[1] if name.endswith("backward") else before[0]
        # Two matrix products in forward and five in backward, of 2·D operations a pair and head.
        a_pair = (10 if name.endswith("backward") else 4) * q.shape[3] * q.shape[2]
        return a_pair * pairs[q.shape[1]], str(q.shape[1])
    return 0, ""


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def is_waited_for_later(func: Any, args: Any) -> bool:
    """Say whether a collective was called with `async_op`; the call omits arguments that have their default."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.name == "async_op":
            return bool(args[index] if index < len(args) else argument.default_value)
    return False


def lies_on(value: Any, device_type: str) -> bool:
    """Say whether a value is a tensor on a device of this type."""
    return isinstance(value, Tensor) and value.device.type == device_type
