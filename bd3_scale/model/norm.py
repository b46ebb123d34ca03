"""RMSNorm and LayerNorm for megatron-core's layer specs.

megatron's own norms take no part in tensor parallelism; these mark the parameters whose gradients do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class Norm(nn.Module):
    """RMSNorm (Zhang & Sennrich, 2019) or LayerNorm over the last dimension, in the input's dtype.

    Parameters whose gradient is a partial sum on every tensor-parallel rank (norms over a rank's own heads) carry
    `partial_over_tp`; the engine sums those gradients over the tensor-parallel group.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float, *, rms: bool, bias: bool, partial_over_tp: bool
    ) -> None:
        super().__init__()
        self.rms = rms
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype)) if bias else None
        for parameter in self.parameters():
            parameter.partial_over_tp = partial_over_tp  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        if self.rms:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def hidden_norm(*, rms: bool, bias: bool) -> ModuleSpec:
    """Spec of a norm over the hidden dimension."""
    return ModuleSpec(module=Norm, params={"rms": rms, "bias": bias, "partial_over_tp": False})


def head_norm(*, tensor_parallel: bool) -> ModuleSpec:
    """Spec of the RMSNorm over each head's own dimensions (q/k norm): a tensor-parallel rank sees its own heads only.
    Spec of the RMSNorm over each head's own dimensions (q/k norm): a tensor-parallel rank sees its own heads only.
    """
    return ModuleSpec(module=Norm, params={"rms": True, "bias": False, "partial_over_tp": tensor_parallel})
