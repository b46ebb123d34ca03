"""Register the attention backends and choose the one that runs.

The choice follows from the recipe, from $BD3_SCALE_ATTENTION, and from what the device and the shapes allow. The module
loads without PyTorch: recipes name backends, and a launcher checks a recipe in half a second.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from typing import TYPE_CHECKING, Any, cast

from bd3_scale.registry import attention_backends

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ENVIRONMENT = "BD3_SCALE_ATTENTION"
KERNEL_HEAD_DIMS = (16, 32, 64, 128, 256)


class Backend:
    """A way to compute attention, registered with `@attention_backends.register("name")`.

    Shapes are those of `bd3_scale.attention.dispatch`, which has checked them. Values are not checked there; on CPU a
    backend may call `check_spans`.
    """

    def obstacle(self, device: str, dtype: torch.dtype, head_dim: int) -> str | None:
        """Return why the backend cannot take such tensors on a device of this type, or None."""
        return None

    def block_attention(self, q: Tensor, k: Tensor, v: Tensor, spans: Tensor, num_noisy: int, scale: float) -> Tensor:
        """Compute `dispatch.block_attention`; autograd can differentiate the result."""
        raise NotImplementedError

    def decode_attention(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float) -> Tensor:
        """Compute `dispatch.decode_attention`; by default with the code of `reference`."""
        from bd3_scale.attention.reference import reference_decode

        return reference_decode(q, k, v, lengths, scale)


class KernelBackend(Backend):
    """A backend with a backward of its own, called through torch operators: see `bd3_scale.attention.ops`.

    name: the name under which it is registered.
    """

    name: str

    def kernels(self) -> Any:
        """Return the module with its `forward`, `backward` and `decode`."""
        raise NotImplementedError

    def block_attention(self, q: Tensor, k: Tensor, v: Tensor, spans: Tensor, num_noisy: int, scale: float) -> Tensor:
        from bd3_scale.attention import ops

        if num_noisy and k.shape[1] == num_noisy * spans.shape[2]:
            spans, num_noisy = ops.noisy_rows_as_documents(spans, num_noisy), 0
        return ops.block_attention(q, k, v, spans, num_noisy, scale, self.name)[0]

    def decode_attention(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float) -> Tensor:
        from bd3_scale.attention import ops

        return ops.decode_attention(q, k, v, lengths, scale, self.name)


@attention_backends.register("reference")
class Reference(Backend):
    """Attention by dense masks: the oracle."""

    def block_attention(self, q: Tensor, k: Tensor, v: Tensor, spans: Tensor, num_noisy: int, scale: float) -> Tensor:
        from bd3_scale.attention.reference import reference_attention
        from bd3_scale.attention.spans import check_spans

        if spans.device.type == "cpu":
            check_spans(spans, num_keys=k.shape[1] - num_noisy * spans.shape[2])
        return reference_attention(q, k, v, spans, num_noisy, scale)


@attention_backends.register("cpu")
class Cpu(KernelBackend):
    """PyTorch's flash kernel for CPU, a chunk of positions at a time."""

    name = "cpu"

    def obstacle(self, device: str, dtype: torch.dtype, head_dim: int) -> str | None:
        return None if device == "cpu" else f"it takes tensors on CPU, not on {device}"

    def kernels(self) -> Any:
        from bd3_scale.attention import cpu

        return cpu

    def decode_attention(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float) -> Tensor:
        import torch
        from torch.utils._python_dispatch import is_in_torch_dispatch_mode

        # The torch operator is a third of a small call's time. It is only needed where something observes operators:
        # compilation, FLOP counting, fake tensors.
        if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or q.numel() == 0:
            return super().decode_attention(q, k, v, lengths, scale)
        return cast("Tensor", self.kernels().decode(q, k, v, lengths, scale))


@attention_backends.register("triton")
class Triton(KernelBackend):
    """The package's own kernels for CUDA."""

    name = "triton"

    def obstacle(self, device: str, dtype: torch.dtype, head_dim: int) -> str | None:
        import torch

        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if device != "cuda" and not interpreted:
            return f"Triton kernels need a CUDA device, not {device}"
        if interpreted and dtype == torch.bfloat16:
            # Triton 3.9: `tl.dot` of bfloat16 gives wrong numbers in the interpreter, without an error.
            return "Triton's interpreter multiplies bfloat16 wrongly"
        if not _is_short(dtype):
            return f"the kernels take float16, bfloat16 and float32, not {dtype}"
        if device == "cuda" and torch.cuda.get_device_capability() < (8, 0):
            return "Triton's matrix products need compute capability 8.0"
        if dtype == torch.float32 and head_dim > 128:
            return f"float32 with head_dim {head_dim} does not fit into the registers"
        if head_dim not in KERNEL_HEAD_DIMS:
            return f"head_dim is {head_dim} and must be one of {', '.join(map(str, KERNEL_HEAD_DIMS))}"
        return None

    def kernels(self) -> Any:
        from bd3_scale.attention.kernels import launch

        return launch

    def block_attention(self, q: Tensor, k: Tensor, v: Tensor, spans: Tensor, num_noisy: int, scale: float) -> Tensor:
        q, k, v = (_with_whole_heads(x) for x in (q, k, v))
        return super().block_attention(q, k, v, spans, num_noisy, scale)

    def decode_attention(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float) -> Tensor:
        q, k, v = (_with_whole_heads(x) for x in (q, k, v))
        return super().decode_attention(q, k, v, lengths, scale)


@attention_backends.register("flex")
class Flex(Backend):
    """Compiled FlexAttention."""

    def obstacle(self, device: str, dtype: torch.dtype, head_dim: int) -> str | None:
        if device == "cuda" and _is_short(dtype) and head_dim >= 16:
            return None
        return f"it takes 16- and 32-bit tensors of head_dim 16 or more on CUDA, not {dtype} of {head_dim} on {device}"

    def block_attention(self, q: Tensor, k: Tensor, v: Tensor, spans: Tensor, num_noisy: int, scale: float) -> Tensor:
        from bd3_scale.attention.flex import flex_block_attention

        return flex_block_attention(q, k, v, spans, num_noisy, scale)


def choose_backend(requested: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Return the name of the registered backend to use: `requested`, or $BD3_SCALE_ATTENTION where it is set.

    `auto` takes `cpu` for tensors on CPU and `triton` elsewhere. Where the kernels refuse the tensors it takes `flex`,
    or `reference` where `flex` cannot run either, with one warning.
    ValueError: an unknown name, or a backend that cannot run here.
    """
    wanted = os.environ.get(ENVIRONMENT) or requested
    if wanted == "auto":
        return _automatic(device.type, dtype, head_dim)
    try:
        obstacle = _obstacle(wanted, device.type, dtype, head_dim)
    except ValueError as error:
        source = f"${ENVIRONMENT}" if os.environ.get(ENVIRONMENT) else "attention backend"
        raise ValueError(f"{source} is neither 'auto' nor a known name: {error}") from None
    if obstacle:
        raise ValueError(f"attention backend {wanted!r} cannot run: {obstacle}; 'auto' takes a backend that can run")
    return wanted


@functools.cache
def _automatic(device: str, dtype: torch.dtype, head_dim: int) -> str:
    if device == "cpu":
        return "cpu"
    obstacle = _obstacle("triton", device, dtype, head_dim)
    if not obstacle:
        return "triton"
    fallback = "reference" if _obstacle("flex", device, dtype, head_dim) else "flex"
    warnings.warn(f"the attention kernels cannot run here ({obstacle}): {fallback!r} runs instead", stacklevel=4)
    return fallback


@functools.cache
def _obstacle(backend: str, device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    obstacle: str | None = attention_backends.get(backend)().obstacle(device, dtype, head_dim)
    return obstacle


def _is_short(dtype: torch.dtype) -> bool:
    import torch

    return dtype in (torch.float16, torch.bfloat16, torch.float32)


def _with_whole_heads(x: Tensor) -> Tensor:
    """Return `x` with each head contiguous in memory: the kernels assume stride 1 along head_dim, unchecked."""
    return x if x.stride(-1) == 1 else x.contiguous()
