"""The vocabulary-parallel head and its cross-entropy, in pieces: logits of all rows never exist at once.

Legend: M rows, X hidden size, V vocabulary entries of this tensor-parallel rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor

from bd3_scale.recipe.vocabulary import Vocabulary

# fp32 logits of a piece: 256 MiB, 512 rows of a vocabulary of 128k, so that its products keep a GPU busy.
PIECE_ELEMENTS = 1 << 26


class OutputLayer(ColumnParallelLinear):
    """Logits in fp32, with −∞ where a clean token cannot be: the mask's id and those that pad the vocabulary."""

    def __init__(self, *args: Any, vocabulary: Vocabulary, score_entropy: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A score is the exponential of its logit over the number of clean tokens; all are about 1 / that at first.
        self.score_offset = math.log(vocabulary.size - 1) if score_entropy else None
        ids = torch.arange(vocabulary.padded_size).chunk(self.tp_group.size())[self.tp_group.rank()]
        forbidden = (ids == vocabulary.mask_id) | (ids >= vocabulary.size)
        self.first_id = self.tp_group.rank() * len(ids)
        self.register_buffer("forbidden_V", forbidden, persistent=False)

    @torch.no_grad()
    def zero_forbidden_rows(self) -> None:
        """Rows that no gradient reaches: an engine that does not know what is forbidden meets a logit of zero there."""
        assert self.weight is not None
        self.weight[self.forbidden_V] = 0

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor | None = None,
        targets: Tensor | None = None,
        row_weights: Tensor | None = None,
    ) -> Any:
        """Logits of `hidden` [..., X] as [..., V]; or with `targets` and `row_weights` [M] for rows [M, X], the
        weighted sum of their negative log-likelihoods in nats, a scalar, and each of them, [M] fp32 without gradient.
        With `score_entropy` it is SEDD's loss (Lou et al., ICML 2024, definition 3.1 for absorbing noise) in their
        place: scores u that need not sum to 1 lose Σ u − 1 − log u of the target, which bounds the likelihood with the
        same weights and is least where u is the probability.

        hidden is whole on every tensor-parallel rank; its gradient is this rank's part of the sum over them.
        """
        weight = self.weight if weight is None else weight
        assert weight is not None
        if targets is None:
            return F.linear(hidden, weight, self.bias).float().masked_fill(self.forbidden_V, float("-inf"))
        return _CrossEntropy.apply(
            hidden, weight, self.bias, targets, row_weights, self.forbidden_V, self, torch.is_grad_enabled()
        )


class _CrossEntropy(torch.autograd.Function):
    """Σ weight · nll, whose gradients are made in forward, while a piece's logits are there: nothing is computed twice.

    The way of fused linear cross-entropy (Liger Kernel, Hsu et al., 2024), on megatron's vocabulary-parallel pieces.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MX: Tensor,
        weight_VX: Tensor,
        bias_V: Tensor | None,
        targets_M: Tensor,
        row_weights_M: Tensor,
        forbidden_V: Tensor,
        layer: OutputLayer,
        training: bool,
    ) -> tuple[Tensor, Tensor]:
        nll_M = torch.empty(len(targets_M), dtype=torch.float32, device=hidden_MX.device)
        grad_hidden = torch.empty_like(hidden_MX if training else hidden_MX[:0])
        grad_weight = torch.zeros_like(weight_VX if training else weight_VX[:0], dtype=torch.float32)
        grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if training and bias_V is not None else None
        piece = max(1, PIECE_ELEMENTS // weight_VX.shape[0])
        for start in range(0, len(targets_M), piece):
            rows = slice(start, start + piece)
            logits = F.linear(hidden_MX[rows], weight_VX, bias_V).float().masked_fill_(forbidden_V, float("-inf"))
            nll_M[rows], softmax, missing, place, log_total = _piece_nll(logits, targets_M[rows], layer)
            if layer.score_offset is not None:
                log_total = log_total - layer.score_offset
                nll_M[rows] += torch.expm1(log_total) - log_total
                softmax *= log_total.exp()[:, None]
            if training:
                operands = VocabParallelCrossEntropy.prepare_gradient_calculation_operands(softmax, missing)
                grad_2d, arange, update, grad_logits = operands
                grad_logits = VocabParallelCrossEntropy.calculate_gradients(
                    grad_2d, arange, place, update, grad_logits, row_weights_M[rows]
                )
                grad_low = grad_logits.to(hidden_MX.dtype)
                grad_hidden[rows] = grad_low @ weight_VX
                grad_weight += grad_low.t() @ hidden_MX[rows]
                if grad_bias is not None:
                    grad_bias += grad_logits.sum(0)
        if training:
            ctx.dtypes = weight_VX.dtype, None if bias_V is None else bias_V.dtype
            ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.mark_non_differentiable(nll_M)
        return (nll_M * row_weights_M).sum(), nll_M

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        grad_bias = None if grad_bias is None else (grad_bias * grad_loss).to(bias_dtype)
        return grad_hidden * grad_loss, (grad_weight * grad_loss).to(weight_dtype), grad_bias, *(None,) * 5


def _piece_nll(logits: Tensor, targets: Tensor, layer: OutputLayer) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """nll, this rank's softmax (in the memory of `logits`), which targets other ranks hold, their places, and the
    logarithm of the sum of all exponentials.
    """
    group = layer.tp_group
    logits, highest = VocabParallelCrossEntropy.calculate_logits_max(logits)
    if group.size() > 1:
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    end = layer.first_id + logits.shape[1]
    missing, place, predicted, total, exponentials = VocabParallelCrossEntropy.calculate_predicted_logits(
        logits, targets, highest, layer.first_id, end
    )
    if group.size() > 1:
        sums = torch.stack([predicted, total])
        dist.all_reduce(sums, group=group)
        predicted, total = sums
    softmax, nll = VocabParallelCrossEntropy.calculate_cross_entropy_loss(exponentials, predicted, total)
    return nll, softmax, missing, place, highest + total.log()
