"""Compute the matrix products of the linears and the head, by the faster library on this CPU.

On x86 PyTorch gives fp32 products to MKL. On CPUs that are not Intel's, MKL uses AVX2 kernels even if the CPU has
AVX-512; oneDNN uses what the CPU has. Measured on one core: 100 GFLOP/s by MKL and 240 by oneDNN on an AMD core with
512-bit units; 80 to 99 and 110 on a Zen 4 core, which has 256-bit units. On Intel's CPUs MKL is faster.

The choice follows from the CPU's vendor and flags and not from a measured time. A run, its resume, and all ranks on
such machines therefore add in the same order, whatever else the machine does. A switch of PyTorch, or an environment
variable, can make oneDNN multiply fp32 in bf16; a product at the first use checks that it does not.

$BD3_SCALE_PRODUCTS=mkl or onednn overrides the choice. Tensors on a GPU, 16-bit tensors and fake tensors go through
PyTorch.

Legend: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import register_flop_formula

from bd3_scale import processor

ENVIRONMENT = "BD3_SCALE_PRODUCTS"
LIBRARIES = ("mkl", "onednn")
# With fewer multiplications oneDNN's call, which takes 20 µs, costs more than its kernels save.
_LEAST_WORK = 1 << 22


def product(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + b [M, N], as F.linear does, but not recorded by autograd."""
    if not _by_onednn(x_MK, len(x_MK) * weight_NK.numel()):
        return F.linear(x_MK, weight_NK, bias_N)
    return _onednn(x_MK, weight_NK, bias_N)


def product_into(out_MN: Tensor, x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> None:
    """Write `product` into `out_MN`."""
    if _by_onednn(x_MK, len(x_MK) * weight_NK.numel()):
        out_MN.copy_(_onednn(x_MK, weight_NK, bias_N))
    elif bias_N is None:
        torch.mm(x_MK, weight_NK.t(), out=out_MN)
    else:
        torch.addmm(bias_N, x_MK, weight_NK.t(), out=out_MN)


def input_gradient(grad_MN: Tensor, weight_NK: Tensor) -> Tensor:
    """Return the gradient [M, K] of `product`'s x."""
    if not _by_onednn(grad_MN, len(grad_MN) * weight_NK.numel()):
        return grad_MN @ weight_NK
    return _onednn(grad_MN, weight_NK.t(), None)


def weight_gradient(grad_MN: Tensor, x_MK: Tensor) -> Tensor:
    """Return the gradient [N, K] of `product`'s weight."""
    if not _by_onednn(grad_MN, grad_MN.numel() * x_MK.shape[1]):
        return grad_MN.t() @ x_MK
    # oneDNN copies its first operand when that is a transpose, so the narrower one comes first.
    if grad_MN.shape[1] <= x_MK.shape[1]:
        return _onednn(grad_MN.t(), x_MK.t(), None)
    return _onednn(x_MK.t(), grad_MN.t(), None).t()


def add_weight_gradient(total_NK: Tensor | None, grad_MN: Tensor, x_MK: Tensor) -> Tensor:
    """Return total + `weight_gradient` in fp32 (or fp64), in the memory of `total` where it is given.

    On a GPU the product adds to the fp32 sum as it writes: the gradient is not rounded to bf16 in between, and memory
    is passed over once.
    """
    if grad_MN.device.type == "cuda" and grad_MN.dtype.itemsize < 4:
        if total_NK is None:
            return torch.mm(grad_MN.t(), x_MK, out_dtype=torch.float32)
        return torch.addmm(total_NK, grad_MN.t(), x_MK, out_dtype=torch.float32, out=total_NK)
    if (
        total_NK is not None
        and total_NK.dtype == grad_MN.dtype
        and not _by_onednn(grad_MN, grad_MN.numel() * x_MK.shape[1])
    ):
        return torch.addmm(total_NK, grad_MN.t(), x_MK, out=total_NK)
    gradient = weight_gradient(grad_MN, x_MK)
    if total_NK is None:
        return gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return total_NK.add_(gradient)


@functools.cache
def fp32_library() -> str:
    """Return which of LIBRARIES multiplies fp32 matrices on this CPU.

    ValueError: $BD3_SCALE_PRODUCTS names another one, or oneDNN where PyTorch was built without it.
    """
    wanted = os.environ.get(ENVIRONMENT, "")
    if wanted not in ("", *LIBRARIES):
        raise ValueError(f"${ENVIRONMENT} is {wanted!r}: set it to {' or '.join(LIBRARIES)}, or leave it out")
    has_onednn = torch.backends.mkldnn.is_available()
    if wanted == "onednn" and not has_onednn:
        raise ValueError(f"${ENVIRONMENT} is 'onednn', and this PyTorch was built without it: unset the variable")
    if wanted:
        return wanted
    # Where MKL is not available PyTorch uses a third library, which was not measured: it stays.
    slow = torch.backends.mkl.is_available() and processor.vendor() != "GenuineIntel" and "avx512f" in processor.flags()
    return "onednn" if slow and has_onednn and _onednn_is_exact() else "mkl"


def _onednn_is_exact() -> bool:
    """Say whether oneDNN's error against fp64 is at most twice PyTorch's, in a product of 4 M multiplications."""
    # Modes that count FLOPs or trace the first step must not see this product.
    with _disable_current_modes():
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(rows, 256, generator=generator) for rows in (96, 176))
        exact = x.double() @ weight.double().t()
        products = (_onednn(x, weight, None), x @ weight.t())
        ours, theirs = ((result.double() - exact).square().sum() for result in products)
        # Of squared errors: a factor of 2 in the error.
        return bool(ours <= 4 * theirs)


def few_rows_by_onednn(weight: Tensor) -> bool:
    """Say whether oneDNN should multiply few fp32 rows by this weight, laid out in its own format.

    Larger weights are faster by oneDNN on Intel's CPUs, too: 16 rows by weights of 512 × 1,536 and more take 0.7 to
    0.85 of MKL's time with a transposed weight. By 512 × 512 they take 1.3 of it.
    """
    if fp32_library() == "onednn":
        return True
    is_free = not os.environ.get(ENVIRONMENT) and torch.backends.mkldnn.is_available()
    return is_free and weight.numel() > 1 << 19 and _onednn_is_exact()


def _by_onednn(x: Tensor, multiplications: int) -> bool:
    return (
        multiplications >= _LEAST_WORK
        and x.dtype is torch.float32
        and x.device.type == "cpu"
        and not isinstance(x, FakeTensor)
        and fp32_library() == "onednn"
    )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return out


@register_flop_formula(torch.ops.mkldnn._linear_pointwise)
def _flops(x_shape: tuple[int, ...], weight_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    rows = 1
    for size in x_shape[:-1]:
        rows *= size
    return 2 * rows * weight_shape[0] * weight_shape[1]
