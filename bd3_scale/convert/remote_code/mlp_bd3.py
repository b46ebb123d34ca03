"""Define the part of a layer behind its attention: an MLP, or a mixture of experts, MLPs of which each row uses a few.

Legend: N rows, X hidden size, E experts, A experts per row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_bd3 import Bd3Config

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


class Bd3MLP(nn.Module):
    """Two projections with an activation between them, or three with a gate."""

    def __init__(self, config: Bd3Config, width: int) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.gated = config.gated_mlp
        if self.gated:
            self.gate_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(self.activation(self.up_proj(x)))


class Bd3Router(nn.Module):
    """Chooses the experts of each row, in fp32: those with the highest scores, plus a bias if the model has one.

    With groups of experts only the `topk_group` groups are considered whose two best experts have the highest sum of
    scores (DeepSeek-V3).
    """

    def __init__(self, config: Bd3Config) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        bias = nn.Parameter(torch.zeros(config.num_experts), requires_grad=False)
        self.expert_bias = bias if config.moe_router_enable_expert_bias else None

    def forward(self, x_NX: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts of each row, [N, A], and their weights, fp32 [N, A]."""
        config = self.config
        logits_NE = F.linear(x_NX.float(), self.weight.float())
        is_softmax = config.score_function == "softmax"
        scores_NE = logits_NE.softmax(-1) if is_softmax else logits_NE.sigmoid()
        ranked_NE = scores_NE if self.expert_bias is None else scores_NE + self.expert_bias
        if config.n_group > 1:
            ranked_NE = self._best_groups(ranked_NE)
        chosen_NA = ranked_NE.topk(config.num_experts_per_tok, dim=-1).indices
        weights_NA = scores_NE.gather(-1, chosen_NA)
        if config.norm_topk_prob and (is_softmax or config.num_experts_per_tok > 1):
            weights_NA = weights_NA / (weights_NA.sum(-1, keepdim=True) + 1e-20)
        return chosen_NA, weights_NA * config.routed_scaling_factor

    def _best_groups(self, ranked_NE: Tensor) -> Tensor:
        """Return the scores with −∞ for the experts of groups that are not considered."""
        grouped = ranked_NE.unflatten(-1, (self.config.n_group, -1))
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(self.config.topk_group, dim=-1).indices
        others = torch.ones(grouped.shape[:-1], dtype=torch.bool, device=grouped.device).scatter(-1, best, False)
        return grouped.masked_fill(others[..., None], float("-inf")).flatten(-2)


class Bd3MoE(nn.Module):
    """A mixture of experts: the weighted sum, in fp32, of the outputs of a row's experts, plus a shared expert's."""

    def __init__(self, config: Bd3Config) -> None:
        super().__init__()
        self.gate = Bd3Router(config)
        self.experts = nn.ModuleList(Bd3MLP(config, config.moe_intermediate_size) for _ in range(config.num_experts))
        shared = config.shared_expert_intermediate_size or config.num_shared_experts * config.moe_intermediate_size
        self.shared_experts = Bd3MLP(config, shared) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        x_NX = x.flatten(0, -2)
        chosen_NA, weights_NA = self.gate(x_NX)
        out_NX = torch.zeros_like(x_NX, dtype=torch.float32)
        for expert in chosen_NA.unique().tolist():
            rows, rank = torch.where(chosen_NA == expert)
            part = self.experts[expert](x_NX[rows]).float() * weights_NA[rows, rank, None]
            out_NX.index_add_(0, rows, part)
        out = out_NX.to(x.dtype).view_as(x)
        return out if self.shared_experts is None else out + self.shared_experts(x)


def make_mlp(config: Bd3Config, layer: int) -> nn.Module:
    """Return the mixture of experts of a layer, or its MLP in the first layers and in a model without experts."""
    if config.num_experts and layer >= config.first_k_dense_replace:
        return Bd3MoE(config)
    return Bd3MLP(config, config.intermediate_size)
