"""megatron-core's parallel linears as one call each, and the same products laid out for decoding.

Legend: X features in, Y features out of this tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    linear_with_grad_accumulation_and_async_allreduce,
)
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup

Product = Callable[[Tensor], Tensor]
# What oneDNN calls the activations that it applies to a product it still has in registers.
_FUSED = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}


class ColumnLinear(ColumnParallelLinear):
    """x ↦ x Wᵀ + b, of whose features each tensor-parallel rank makes its share; x is whole, or the rank's rows of it
    under sequence parallelism.
    """

    weight: Tensor
    bias: Tensor | None
    tp_group: ProcessGroup

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool, config: ModelParallelConfig, group: ProcessGroup
    ) -> None:
        how = {"init_method": None, "gather_output": False, "skip_bias_add": False, "tp_group": group}
        super().__init__(inputs, outputs, config=config, bias=bias, **how)

    def forward(self, x: Tensor, part: tuple[int, slice] | None = None) -> Tensor:
        """x [rows, B, X] → [rows, B, Y]; `part` (n, s): of every n features, those of s alone."""
        weight, bias = self.weight, self.bias
        if part is not None:
            size, kept = part
            weight = weight.unflatten(0, (-1, size))[:, kept].flatten(0, 1)
            bias = None if bias is None else bias.unflatten(0, (-1, size))[:, kept].flatten()
        return linear_with_grad_accumulation_and_async_allreduce(
            x,
            weight,
            bias,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=self.allreduce_dgrad,
            sequence_parallel=self.sequence_parallel,
            tp_group=self.tp_group,
        )

    def for_decoding(self, activation: str | None = None) -> Product:
        """Return what `forward` computes with the weights of now; see `packed`."""
        return packed(self.weight, self.bias, activation)


class RowLinear(RowParallelLinear):
    """x ↦ x Wᵀ + b, summed over tensor-parallel ranks, each of which has its share of the features of x."""

    weight: Tensor
    bias: Tensor | None
    tp_group: ProcessGroup

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool, config: ModelParallelConfig, group: ProcessGroup
    ) -> None:
        how = {"init_method": None, "input_is_parallel": True, "skip_bias_add": False, "tp_group": group}
        super().__init__(inputs, outputs, config=config, bias=bias, **how)

    def forward(self, x: Tensor) -> Tensor:
        """x [rows, B, X] → [rows, B, Y], or the rank's rows of it under sequence parallelism."""
        out = linear_with_grad_accumulation_and_async_allreduce(
            x,
            self.weight,
            None,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=False,
            sequence_parallel=False,
            tp_group=None,
        )
        if self.sequence_parallel:
            out = reduce_scatter_to_sequence_parallel_region(out, group=self.tp_group)
        elif self.tp_group.size() > 1:
            out = reduce_from_tensor_model_parallel_region(out, group=self.tp_group)
        return out if self.bias is None else out + self.bias

    def for_decoding(self) -> Product:
        """Return what `forward` computes with the weights of now; see `packed`."""
        if self.tp_group.size() == 1:
            return packed(self.weight, self.bias)
        product, bias, group = packed(self.weight, None), self.bias, self.tp_group

        def summed(x: Tensor) -> Tensor:
            out = product(x)
            dist.all_reduce(out, group=group)
            return out if bias is None else out + bias

        return summed


def packed(weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Product:
    """Return x ↦ activation(x Wᵀ + b) for few rows and no gradients, as long as the weights do not change.

    On CPU the weight is laid out once for oneDNN, whose product of few rows takes half as long as torch's own: that one
    lays it out at each call (bf16), or takes a library that is slow on AMD (fp32).

    activation: one that `fuses` with such a product, or None.
    """
    if not _onednn_takes(weight):
        assert activation is None
        return lambda x: F.linear(x, weight, bias)
    laid_out = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    name, algorithm = _FUSED[activation] if activation else ("none", "")
    product = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: product(x, laid_out, bias, name, [], algorithm)


def fuses(activation: str, weight: Tensor) -> bool:
    """Return whether `packed` takes the activation of the recipe's name along with a product by `weight`."""
    return activation in _FUSED and _onednn_takes(weight)


def _onednn_takes(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
