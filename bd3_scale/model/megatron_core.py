"""megatron-core as this package needs it, without two seconds of imports; the rooms that use it import this first.

megatron-core 0.16.1 compiles its fused functions where they are defined, which brings in the whole compiler of PyTorch
(dynamo, inductor, sympy, Triton), and asks for Weights & Biases, with which its inference engine would log. Here each
of those functions is compiled at its first call, and wandb counts as not installed while megatron-core is imported.

Its layers drop the group that they are given where torch.distributed is not set up. Here they take it, so that a
process that is alone needs nothing of torch.distributed; where that is set up, they did so anyway.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch


def _compiled_when_called(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that is compiled when it is first called, in place of `torch.compile`."""

    @functools.cache
    def compiled() -> Callable[..., Any]:
        return torch.compile(function)

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        # A function that calls another is compiled as one.
        return function(*args, **options) if torch.compiler.is_compiling() else compiled()(*args, **options)

    return call


def _import_megatron() -> None:
    wandb, compile_now = sys.modules.get("wandb"), torch.compile
    sys.modules["wandb"] = None  # type: ignore[assignment]
    torch.compile = _compiled_when_called  # type: ignore[assignment]
    try:
        importlib.import_module("megatron.core")
    finally:
        torch.compile = compile_now
        if wandb is None:
            del sys.modules["wandb"]
        else:
            sys.modules["wandb"] = wandb


def _take_given_groups() -> None:
    name = "get_tensor_model_parallel_group_if_none"
    asked = getattr(importlib.import_module("megatron.core.utils"), name)

    @functools.wraps(asked)
    def group_of(tp_group: Any, *args: Any, **options: Any) -> Any:
        return asked(tp_group, *args, **options) if tp_group is None else tp_group

    for module in [module for key, module in sys.modules.items() if key.startswith("megatron.core")]:
        if getattr(module, name, None) is asked:
            setattr(module, name, group_of)


if "megatron.core" not in sys.modules:
    _import_megatron()
_take_given_groups()
