"""Choose the experts of each row and their weights, and keep the load of the experts balanced.

Three means of balance, each optional: a bias on the scores that is moved after each step (DeepSeek-V3), an auxiliary
loss for each sequence (DeepSeek-V3), and a loss on the size of the logits (ST-MoE).

Legend: N rows of all streams of this rank, B sequences, R = N·B rows, P streams, E experts, k of a row, X hidden size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from bd3_scale.model.block import Part
from bd3_scale.recipe.schema import ModelRecipe, MoeRecipe

# At most two noisy copies, and the clean tokens.
MOST_STREAMS = 3


class Routing(NamedTuple):
    """The experts of each row.

    Attributes:
        experts: int64 [R, k].
        weights: fp32 [R, k], the factors of the experts' outputs.
        counts: int64 [E], number of rows of each expert.
    """

    experts: Tensor
    weights: Tensor
    counts: Tensor


class Router(Part):
    """A linear layer in fp32 whose scores choose the experts of each row.

    fp32, since rounding in 16 bits would change which experts are the best (Switch Transformer: Fedus et al., 2021).

    Attributes:
        load: int64 [MOST_STREAMS, E], the number of rows of each stream that were sent to each expert since
            `begin_step`, counted in forward passes with a backward.
    """

    def __init__(self, model: ModelRecipe, config: TransformerConfig, groups: ProcessGroupCollection) -> None:
        super().__init__(config, groups.tp)
        assert model.moe is not None
        self.moe: MoeRecipe = model.moe
        self.cp_group = groups.cp
        self.weight = nn.Parameter(torch.empty(model.moe.num_experts, model.hidden_size, dtype=config.params_dtype))
        # The scores multiply a rank's own channels of the experts, so a rank's gradient is a part of the whole: the
        # engine sums it over tensor-parallel ranks.
        self.weight.partial_over_tp = groups.tp.size() > 1  # type: ignore[attr-defined]
        bias = torch.zeros(model.moe.num_experts, dtype=torch.float32) if model.moe.bias else None
        self.register_buffer("expert_bias", bias)
        load = torch.zeros(MOST_STREAMS, model.moe.num_experts, dtype=torch.int64)
        self.register_buffer("load", load, persistent=False)
        self._of_a_sequence = 0.0

    def forward(self, x_NBX: Tensor, pieces: int = 1) -> Routing:
        """Return the routing of rows […, X]; their first dimension consists of `pieces` streams."""
        logits = x_NBX.float() @ self.weight.float().t()
        scores = logits.softmax(-1) if self.moe.score == "softmax" else logits.sigmoid()
        experts = choose(scores.detach(), self.expert_bias, self.moe)
        weights = _weights(scores.gather(-1, experts), self.moe)
        if not torch.is_grad_enabled():
            counts = _counts(experts.flatten(0, -2)[None], self.moe.num_experts)[0]
            return Routing(experts.flatten(0, -2), weights.flatten(0, -2), counts)
        counts_PBE = _counts(experts.unflatten(0, (pieces, -1)).transpose(1, 2), self.moe.num_experts)
        # Inside of backward this is a recomputation, and the rows have been counted already.
        if torch._C._current_autograd_node() is None:
            self.load[:pieces] += counts_PBE.sum(1)
        if self.moe.aux_loss or self.moe.z_loss:
            weights = _WithLoss.apply(weights, self._losses(logits, scores, counts_PBE.sum(0)))
        return Routing(experts.flatten(0, -2), weights.flatten(0, -2), counts_PBE.sum((0, 1)))

    def begin_step(self, of_a_sequence: float) -> None:
        """Reset the counts; of_a_sequence: the factor of the auxiliary losses of each sequence."""
        self.load.zero_()
        self._of_a_sequence = of_a_sequence

    @torch.no_grad()
    def balance(self, counts_E: Tensor) -> None:
        """Raise the bias of experts with fewer rows of a global batch than the mean, and lower that of the others.

        Auxiliary-loss-free load balancing (Wang et al., 2024; DeepSeek-V3, 2024, section 2.1.2): the bias moves by a
        fixed rate, enters the choice of experts and not their weights, and has no gradient.
        """
        if self.expert_bias is not None:
            # In integers: the comparison with the mean is then exact, and does not depend on the order of summation.
            counts = counts_E.to(torch.int64)
            self.expert_bias += self.moe.bias_update_rate * (counts.sum() - counts * len(counts)).sign()

    def _losses(self, logits_NBE: Tensor, scores_NBE: Tensor, counts_BE: Tensor) -> Tensor:
        """Return the auxiliary losses of this rank's rows, summed over sequences, times `of_a_sequence`.

        - Sequence-wise balance (DeepSeek-V3, 2024, section 2.1.2): E / (k·T) · Σ_e count_e · mean_t p_te, for T rows of
          a sequence; p are the scores normalised over experts. It is 1 for uniform experts.
        - z-loss: the mean of (log Σ_e exp logit_e)², which keeps logits small, so that their exponentials round less
          (ST-MoE: Zoph et al., 2022, equation 5).
        """
        moe, rows = self.moe, len(logits_NBE) * self.cp_group.size()
        total = logits_NBE.new_zeros(())
        if moe.aux_loss:
            if self.cp_group.size() > 1:
                dist.all_reduce(counts_BE, group=self.cp_group)
            shares = scores_NBE / scores_NBE.sum(-1, keepdim=True)
            factor = moe.num_experts / (moe.top_k * rows * rows)
            total = total + moe.aux_loss * factor * (shares.sum(0) * counts_BE).sum()
        if moe.z_loss:
            total = total + moe.z_loss / rows * logits_NBE.logsumexp(-1).square().sum()
        # Every tensor-parallel rank computes the same losses, and the gradients are summed over these ranks.
        return total * (self._of_a_sequence / self.tp_group.size())


def choose(scores: Tensor, bias_E: Tensor | None, moe: MoeRecipe) -> Tensor:
    """Return the experts of each row, int64 […, k], by its scores […, E] and the bias of each expert.

    With groups of experts, only `moe.top_groups` of the `moe.groups` take part: those whose two best experts have the
    highest sum of scores (DeepSeek-V3, 2024, as its published code has it).
    """
    if bias_E is not None:
        scores = scores + bias_E
    if moe.top_groups is not None and moe.top_groups < moe.groups:
        by_group = scores.unflatten(-1, (moe.groups, -1))
        best = by_group.topk(2, -1).values.sum(-1).topk(moe.top_groups, -1).indices
        taken = torch.zeros(by_group.shape[:-1], dtype=torch.bool, device=scores.device).scatter_(-1, best, value=True)
        scores = by_group.masked_fill(~taken[..., None], -torch.inf).flatten(-2)
    return scores.topk(moe.top_k, -1).indices


def _weights(scores: Tensor, moe: MoeRecipe) -> Tensor:
    """Return the factors of the chosen experts' outputs, from their scores […, k]."""
    if moe.score == "softmax":
        weights = scores / scores.sum(-1, keepdim=True) if moe.normalize_top_k else scores
    else:
        # As in the official code of LLaDA2: with top_k = 1 the score is not normalised, since it would always be 1.
        weights = scores / (scores.sum(-1, keepdim=True) + 1e-20) if moe.normalize_top_k and moe.top_k > 1 else scores
    return weights * moe.scale


def _counts(experts: Tensor, num_experts: int) -> Tensor:
    """Return how often each expert was chosen, int64 […, E], for chosen experts […, R, k]."""
    ids = torch.arange(num_experts, device=experts.device)
    return (experts.flatten(-2)[..., None] == ids).sum(-2)


class _WithLoss(torch.autograd.Function):
    """The weights, with an auxiliary loss attached: whenever the weights get a gradient, the loss gets the gradient 1.

    The loss thereby takes part in the step without being returned through all layers and pipeline stages (as
    megatron-core's `MoEAuxLossAutoScaler` does).
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, loss: Tensor) -> Tensor:
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_ones(())
