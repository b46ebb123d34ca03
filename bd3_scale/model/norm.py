"""RMSNorm and LayerNorm for megatron-core's layer specs.

megatron's own norms take no part in sequence parallelism; these mark the parameters whose gradients do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class Norm(nn.Module):
    """RMSNorm (Zhang & Sennrich, 2019) or LayerNorm over the last dimension, in the input's dtype.

    Where a tensor-parallel rank sees a part of the rows (sequence parallelism) or of the heads, its gradient is a
    partial sum: the parameters carry `partial_over_tp`, and the engine sums over the tensor-parallel group.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float, *, rms: bool, bias: bool, of_heads: bool
    ) -> None:
        super().__init__()
        self.rms = rms
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype)) if bias else None
        partial = config.sequence_parallel or (of_heads and config.tensor_model_parallel_size > 1)
        for parameter in self.parameters():
            parameter.partial_over_tp = partial  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        if self.rms:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def hidden_norm(*, rms: bool, bias: bool) -> ModuleSpec:
    """Spec of a norm over the hidden dimension."""
    return ModuleSpec(module=Norm, params={"rms": rms, "bias": bias, "of_heads": False})


def head_norm() -> ModuleSpec:
    """Spec of the RMSNorm over each head's dimensions (q/k norm): a tensor-parallel rank sees its own heads only."""
    return ModuleSpec(module=Norm, params={"rms": True, "bias": False, "of_heads": True})
