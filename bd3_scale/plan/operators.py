"""What can be read off an operator's call: the memory that its kernel moves, and whether it is waited for."""

from __future__ import annotations

from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor

from bd3_scale.fused.ops import TRAFFIC

_ONLY_WRITES = {"copy_", "zero_", "fill_"}


def moved_bytes(func: Any, args: Any, kwargs: Any, after: list[Tensor], device_type: str) -> int:
    """Return the bytes that a kernel reads and writes on a device; what it changes in place it does both with.

    after: what it returns. Our own kernels say what they move, see `bd3_scale.fused.ops`.
    """
    name = func._schema.name.partition("::")[2]
    if name in TRAFFIC:
        return TRAFFIC[name](*args)
    read: dict[int, Tensor] = {}
    written = {id(x): x for x in after}
    for place, argument in enumerate(func._schema.arguments):
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        tensors = {id(x): x for x in pytree.tree_leaves(value) if isinstance(x, Tensor)}
        changed = argument.alias_info is not None and argument.alias_info.is_write
        if not (changed and (argument.is_out or name in _ONLY_WRITES)):
            read |= tensors
        written |= tensors if changed else {}
    both = (*read.values(), *written.values())
    found = sum(_size(x) for x in both if x.device.type == device_type)
    # A gather reads a row as often as it returns it.
    return found + (max(0, _size(after[0]) - _size(args[0])) if name == "index" else 0)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def is_waited_for_later(func: Any, args: Any) -> bool:
    """Tell whether a collective was called with `async_op`; arguments that have their defaults are left out."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == "async_op":
            return bool(args[place] if place < len(args) else argument.default_value)
    return False


def lies_on(value: Any, device_type: str) -> bool:
    """Tell whether a value is a tensor on a device of this type."""
    return isinstance(value, Tensor) and value.device.type == device_type
