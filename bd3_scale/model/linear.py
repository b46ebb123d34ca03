"""megatron-core's parallel linears as one call each, and the same products laid out for decoding."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from bd3_scale.model.products import fp32_library

# What oneDNN calls the activations that it applies to a product it still has in registers.
_FUSED = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}
_product = functools.partial(
    layers.linear_with_grad_accumulation_and_async_allreduce,
    gradient_accumulation_fusion=False,
    allreduce_dgrad=False,
    sequence_parallel=False,
)


class ColumnLinear(layers.ColumnParallelLinear):
    """x ↦ x Wᵀ + b, of whose features each tensor-parallel rank makes its share.

    x is whole on every rank; under sequence parallelism a rank has its rows, and makes its features of all.
    """

    weight: Tensor
    tp_group: ProcessGroup

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool, config: ModelParallelConfig, group: ProcessGroup
    ) -> None:
        super().__init__(inputs, outputs, config=config, init_method=None, bias=bias, tp_group=group)

    def forward(self, x: Tensor, select: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return [rows, B, outputs of the rank] for x [rows, B, inputs]; `select`: rows of weight and bias to use."""
        weight, bias = self.weight, self.bias
        if select is not None:
            weight, bias = select(weight), None if bias is None else select(bias)
        return _product(
            x,
            weight,
            bias,
            allreduce_dgrad=self.allreduce_dgrad,
            sequence_parallel=self.sequence_parallel,
            tp_group=self.tp_group,
        )

    def for_decoding(self, activation: str | None = None) -> Callable[[Tensor], Tensor]:
        """Return `forward` with the weights of now, and activation(·) of it; see `packed`."""
        return packed(self.weight, self.bias, activation)


class RowLinear(layers.RowParallelLinear):
    """x ↦ x Wᵀ + b, summed over tensor-parallel ranks, each of which has its share of the features of x.

    Under sequence parallelism a rank keeps its rows of the sum.
    """

    weight: Tensor
    tp_group: ProcessGroup

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool, config: ModelParallelConfig, group: ProcessGroup
    ) -> None:
        how = {"input_is_parallel": True, "skip_bias_add": False, "tp_group": group}
        super().__init__(inputs, outputs, config=config, init_method=None, bias=bias, **how)

    def forward(self, x: Tensor) -> Tensor:
        """Return [rows, B, outputs] for x [rows, B, inputs of the rank]."""
        out = _product(x, self.weight, None)
        if self.sequence_parallel:
            out = reduce_scatter_to_sequence_parallel_region(out, group=self.tp_group)
        elif self.tp_group.size() > 1:
            out = reduce_from_tensor_model_parallel_region(out, group=self.tp_group)
        return out if self.bias is None else out + self.bias

    def for_decoding(self) -> Callable[[Tensor], Tensor]:
        """Return `forward` with the weights of now; see `packed`."""
        if self.tp_group.size() == 1:
            return packed(self.weight, self.bias)
        product, bias, group = packed(self.weight, None), self.bias, self.tp_group

        def summed(x: Tensor) -> Tensor:
            out = product(x)
            dist.all_reduce(out, group=group)
            return out if bias is None else out + bias

        return summed


def packed(weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Callable[[Tensor], Tensor]:
    """Return x ↦ activation(x Wᵀ + b) for few rows and without gradients, as long as the weights do not change.

    On CPU the weight is laid out once: for oneDNN, whose product of few rows takes half as long as torch's own, which
    lays it out at each call (bf16), or takes a library that is slow on AMD (fp32); where MKL multiplies fp32, inputs by
    outputs, which takes three quarters of oneDNN's time.

    activation: None, or one of a linear that `fuses` it.
    """
    if not _onednn_takes(weight):
        assert activation is None
        if weight.device.type != "cpu" or weight.dtype != torch.float32:
            return lambda x: F.linear(x, weight, bias)
        columns, constant = weight.detach().t().contiguous(), bias
        return (lambda x: x @ columns) if constant is None else (lambda x: (x @ columns).add_(constant))
    laid_out = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    name, algorithm = _FUSED[activation] if activation else ("none", "")
    product = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: product(x, laid_out, bias, name, [], algorithm)


def fuses(activation: str, linear: ColumnLinear) -> bool:
    """Return whether decoding can apply this activation of a recipe along with the linear's product."""
    return type(linear) is ColumnLinear and activation in _FUSED and _onednn_takes(linear.weight)


def _onednn_takes(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32 and fp32_library() == "onednn"
