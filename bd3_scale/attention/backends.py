"""Which backend runs: the recipe's wish, the environment's, and what the device and the shapes allow."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings

import torch

BACKENDS = ("auto", "reference", "cpu", "triton", "flex")
ENVIRONMENT = "BD3_SCALE_ATTENTION"

KERNEL_HEAD_DIMS = (16, 32, 64, 128, 256)
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def choose_backend(requested: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """One of `reference`, `cpu`, `triton`, `flex`, for `requested` or, over it, $BD3_SCALE_ATTENTION.

    `auto` takes `cpu` for tensors there, and elsewhere `triton`, or with one warning `flex` where the kernels refuse
    the shape, and `reference` where neither runs.
    ValueError: an unknown name, or a backend that cannot run here.
    """
    wanted = os.environ.get(ENVIRONMENT) or requested
    if wanted not in BACKENDS:
        source = f"${ENVIRONMENT}" if os.environ.get(ENVIRONMENT) else "backend"
        raise ValueError(f"{source} is {wanted!r}: choose one of {', '.join(BACKENDS)}")
    if wanted == "auto":
        return _automatic(device.type, dtype, head_dim)
    obstacle = _obstacle(wanted, device.type, dtype, head_dim)
    if obstacle:
        raise ValueError(f"attention backend {wanted!r} cannot run: {obstacle}; choose 'auto' to take one that can")
    return wanted


@functools.cache
def _automatic(device: str, dtype: torch.dtype, head_dim: int) -> str:
    if device == "cpu":
        return "cpu"
    obstacle = _obstacle("triton", device, dtype, head_dim)
    if not obstacle:
        return "triton"
    fallback = "reference" if _obstacle("flex", device, dtype, head_dim) else "flex"
    warnings.warn(f"the attention kernels do not run ({obstacle}): {fallback} takes their place", stacklevel=4)
    return fallback


@functools.cache
def _obstacle(backend: str, device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why `backend` cannot take such tensors, or None."""
    if backend == "cpu":
        return None if device == "cpu" else f"it takes tensors on CPU, not on {device}"
    if backend == "triton":
        return _kernel_obstacle(device, dtype, head_dim)
    if backend == "flex" and (device != "cuda" or dtype not in KERNEL_DTYPES or head_dim < 16):
        return f"it takes 16- and 32-bit tensors of head_dim 16 or more on CUDA, not {dtype} of {head_dim} on {device}"
    return None


def _kernel_obstacle(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device != "cuda" and not interpreted:
        return f"Triton kernels need a CUDA device, not {device}"
    if interpreted and dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly"
    if dtype not in KERNEL_DTYPES:
        return f"they have no {dtype}"
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        return "Triton's matrix products need compute capability 8.0"
    if dtype == torch.float32 and head_dim > 128:
        return f"float32 of head_dim {head_dim} does not fit the registers"
    if head_dim not in KERNEL_HEAD_DIMS:
        return f"head_dim {head_dim} is none of {', '.join(map(str, KERNEL_HEAD_DIMS))}"
    return None
