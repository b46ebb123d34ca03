"""A layer's weights for `decode_block`, laid out for products of few rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# What oneDNN calls the activations that it applies to a product it still has in registers.
_FUSED = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}


@dataclass(frozen=True)
class BlockLayer:
    """A layer's weights, as long as they do not change; on CPU the products have copies of their own.

    `groups`: G; `qkv`, `out`, `wide`, `narrow`: the products, `wide` with the activation (half as wide where it is
    gated); `norms`: before attention and MLP; `head_norms`: of queries and keys.
    """

    groups: int
    backend: str
    norms: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
    head_norms: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None
    qkv: Callable[[Tensor], Tensor]
    out: Callable[[Tensor], Tensor]
    wide: Callable[[Tensor], Tensor]
    narrow: Callable[[Tensor], Tensor]
    narrow_bias: Tensor | None

    @classmethod
    def of(cls, layer: Any, activation: str, activate: Callable[[Tensor], Tensor]) -> BlockLayer:
        """From megatron's layer; activation: the recipe's name for it."""
        attention, mlp = layer.self_attention, layer.mlp
        normed_heads = attention.q_layernorm is not None
        return cls(
            attention.num_query_groups_per_partition,
            attention.core_attention.backend,
            (layer.input_layernorm.forward, layer.pre_mlp_layernorm.forward),
            (attention.q_layernorm.forward, attention.k_layernorm.forward) if normed_heads else None,
            _product(attention.linear_qkv.weight, attention.linear_qkv.bias),
            _product(attention.linear_proj.weight, None),
            _wide(mlp.linear_fc1.weight, mlp.linear_fc1.bias, activation, activate),
            _product(mlp.linear_fc2.weight, None),
            mlp.linear_fc2.bias,
        )


def _product(weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Callable[[Tensor], Tensor]:
    """x ↦ activation(x Wᵀ + b). On CPU the weight is laid out once for oneDNN, whose product of few rows takes half as
    long as torch's own: that one lays it out at each call (bf16), or takes a library that is slow on AMD (fp32).
    """
    if not _onednn_takes(weight):
        return lambda x: F.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    name, algorithm = _FUSED[activation] if activation else ("none", "")
    product = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: product(x, packed, bias, name, [], algorithm)


def _wide(
    weight: Tensor, bias: Tensor | None, activation: str, activate: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    if activation in _FUSED and _onednn_takes(weight):
        return _product(weight, bias, activation)
    product = _product(weight, bias)
    if activation != "swiglu":
        return lambda x: activate(product(x))

    def gated(x: Tensor) -> Tensor:
        gate, wide = product(x).chunk(2, -1)
        return activate(gate) * wide

    return gated


def _onednn_takes(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
