"""Matrix products of the linears and the head, by the library that is quickest on this CPU.

PyTorch hands fp32 products on x86 to MKL, which takes AVX2 kernels on CPUs that are not Intel's, whatever they can do:
100 GFLOP/s where oneDNN, which asks the CPU, makes 240 on an AMD core whose AVX-512 is 512 bits wide. On a Zen 4 core,
which has half of that width, it makes 110 where MKL makes 80 to 99. On Intel's own, MKL is the quicker one.
So what decides is the CPU's maker and its flags, and no clock: a run and its resume, and all ranks on such machines,
add in the same order whatever else the machine does. oneDNN must be as exact besides: a switch of PyTorch's or an
environment variable can make it multiply in bf16, and a product at first use tells.

$BD3_SCALE_PRODUCTS=mkl or onednn decides otherwise. Tensors on a GPU, 16-bit ones and fake ones go through PyTorch.

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
# Multiplications below which oneDNN's 20 µs for a call cost more than its kernels save.
_LEAST_WORK = 1 << 22


def product(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + b [M, N], as F.linear does; autograd does not see it."""
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
    # oneDNN copies the transpose of its first operand: let that be the narrower one.
    if grad_MN.shape[1] <= x_MK.shape[1]:
        return _onednn(grad_MN.t(), x_MK.t(), None)
    return _onednn(x_MK.t(), grad_MN.t(), None).t()


def add_weight_gradient(total_NK: Tensor | None, grad_MN: Tensor, x_MK: Tensor) -> Tensor:
    """Return total + `weight_gradient` in fp32 (fp64 of such), in the memory of `total` where there is one.

    On a GPU the product adds to an fp32 sum as it writes: a bf16 gradient is neither rounded nor passed over again.
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
    """Return which of LIBRARIES multiplies fp32 matrices on this CPU; ValueError: an environment that asks for another
    one, or for oneDNN where PyTorch has none.
    """
    wanted = os.environ.get(ENVIRONMENT, "")
    if wanted not in ("", *LIBRARIES):
        raise ValueError(f"${ENVIRONMENT} is {wanted!r}: set it to {' or '.join(LIBRARIES)}, or leave it out")
    has_onednn = torch.backends.mkldnn.is_available()
    if wanted == "onednn" and not has_onednn:
        raise ValueError(f"${ENVIRONMENT} is 'onednn', which this PyTorch was built without: leave it out")
    if wanted:
        return wanted
    # `is_available` of MKL: elsewhere PyTorch has another library, of which nothing was measured.
    slow = torch.backends.mkl.is_available() and processor.vendor() != "GenuineIntel" and "avx512f" in processor.flags()
    return "onednn" if slow and has_onednn and _onednn_is_exact() else "mkl"


def _onednn_is_exact() -> bool:
    """Say whether oneDNN's error against fp64 is at most twice PyTorch's, in a product of 4 M multiplications."""
    # Whoever counts or traces the step that comes first is not shown this.
    with _disable_current_modes():
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(rows, 256, generator=generator) for rows in (96, 176))
        exact = x.double() @ weight.double().t()
        ours, theirs = ((found.double() - exact).square().sum() for found in (_onednn(x, weight, None), x @ weight.t()))
        return bool(ours <= 4 * theirs)


def few_rows_by_onednn(weight: Tensor) -> bool:
    """Return whether oneDNN multiplies few fp32 rows by a weight laid out for it.

    On Intel's CPUs, too, where 16 rows by weights of 512 × 1,536 and more take it 0.7 to 0.85 of the time that they
    take MKL, inputs by outputs; by 512 × 512 they take it 1.3 of that.
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
    found: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return found


@register_flop_formula(torch.ops.mkldnn._linear_pointwise)
def _flops(x_shape: tuple[int, ...], weight_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    rows = 1
    for size in x_shape[:-1]:
        rows *= size
    return 2 * rows * weight_shape[0] * weight_shape[1]
