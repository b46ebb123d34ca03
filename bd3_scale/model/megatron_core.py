"""Import megatron-core in two seconds less, and let its layers work without torch.distributed.

Import this module before any other module of megatron-core.

megatron-core 0.16.1 calls `torch.compile` on its fused functions where they are defined, which imports the whole
compiler of PyTorch (dynamo, inductor, sympy, Triton). It also imports Weights & Biases, for the logs of its inference
engine. Here each of those functions is compiled at its first call, and wandb counts as not installed while
megatron-core is imported.

Its layers ignore the group that they are given where torch.distributed is not initialised. Here they use it, so that a
single process needs no torch.distributed. Where that is initialised nothing changes.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch


def _compiled_when_called(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that is compiled at its first call; it replaces `torch.compile`."""

    @functools.cache
    def compiled() -> Callable[..., Any]:
        return torch.compile(function)

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        # Called from a function that is being compiled, it becomes a part of that function.
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
    original = getattr(importlib.import_module("megatron.core.utils"), name)

    @functools.wraps(original)
    def group_of(tp_group: Any, *args: Any, **options: Any) -> Any:
        return original(tp_group, *args, **options) if tp_group is None else tp_group

    # Modules that imported the function by name hold it themselves, so that each must be patched.
    for module in [module for key, module in sys.modules.items() if key.startswith("megatron.core")]:
        if getattr(module, name, None) is original:
            setattr(module, name, group_of)


if "megatron.core" not in sys.modules:
    _import_megatron()
_take_given_groups()
