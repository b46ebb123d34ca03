"""Patch megatron-core 0.16.1 to run on CPU and gloo; all patches are here.

`tensor_parallel/` and the messages between pipeline stages allocate on `torch.cuda.current_device()`, and
`pipeline_parallel/schedules.py` counts tokens in tensors on the literal device "cuda". Both fail without CUDA.
"""

from __future__ import annotations

import types
from typing import Any

import torch


def install() -> None:
    """Make megatron's schedules run on CPU; calling it again changes nothing.

    Raises:
        RuntimeError: this machine has CUDA, where the patch would be wrong.
    """
    if torch.cuda.is_available():
        raise RuntimeError("megatron-core's CPU patch must not be installed where CUDA is available")
    from megatron.core.pipeline_parallel import schedules

    torch.cuda.current_device = _cpu  # type: ignore[assignment]
    if not isinstance(schedules.torch, _TorchOnCpu):
        schedules.torch = _TorchOnCpu("torch")


def _cpu() -> torch.device:
    return torch.device("cpu")


class _TorchOnCpu(types.ModuleType):
    """A stand-in for the module torch whose `zeros` replaces the device "cuda" by "cpu"."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return torch.zeros(*size, device="cpu" if device == "cuda" else device, **options)
