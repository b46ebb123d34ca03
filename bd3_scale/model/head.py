"""Compute the vocabulary-parallel output head and its cross-entropy, in pieces of rows.

The logits of all rows never exist at once. With 16,384 rows and a vocabulary of 128k they would be 8 GiB in fp32, more
than many models. A piece's logits are turned into their own gradient while they are in memory.

Legend: M rows, X hidden size, V vocabulary entries of this tensor-parallel rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor

from bd3_scale.fused.cross_entropy import logit_gradient_, row_statistics
from bd3_scale.model.products import add_weight_gradient, product, product_into
from bd3_scale.model.rows import RowLoss
from bd3_scale.recipe.schema import ModelRecipe
from bd3_scale.recipe.vocabulary import Vocabulary

# Size of a piece's logits: 512 MiB are 2,048 rows of a vocabulary of 128k in bf16. Each piece reads and writes the
# whole fp32 gradient of the weight; with far fewer rows a GPU would spend its time on that.
PIECE_BYTES = 1 << 29


class OutputLayer(ColumnParallelLinear):
    """Logits in fp32, with −∞ for the mask token and for the ids that pad the vocabulary.

    A clean token is never the mask: its logit is −∞ (the SUBS parameterisation of MDLM, Sahoo et al., NeurIPS 2024).
    The softmax then normalises over clean tokens alone.

    owns_weight: False where `forward` is given the weight of the embedding.
    """

    def __init__(
        self,
        model: ModelRecipe,
        vocabulary: Vocabulary,
        config: ModelParallelConfig,
        group: dist.ProcessGroup,
        *,
        owns_weight: bool = True,
    ) -> None:
        super().__init__(
            model.hidden_size,
            vocabulary.padded_size,
            config=config,
            init_method=None,
            bias=model.head_bias,
            skip_weight_param_allocation=not owns_weight,
            tp_group=group,
        )
        ids = torch.arange(vocabulary.padded_size).chunk(self.tp_group.size())[self.tp_group.rank()]
        forbidden = (ids == vocabulary.mask_id) | (ids >= vocabulary.size)
        self.first_id = self.tp_group.rank() * len(ids)
        self.register_buffer("forbidden_V", forbidden, persistent=False)

    @torch.no_grad()
    def zero_forbidden_rows(self) -> None:
        """Set the rows of forbidden ids to zero; no gradient ever reaches them.

        An inference engine that does not know which ids are forbidden then gets a logit of 0 and not a random one.
        """
        assert self.weight is not None
        self.weight[self.forbidden_V] = 0

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor | None = None,
        targets: Tensor | None = None,
        row_weights: Tensor | None = None,
        row_loss: RowLoss | None = None,
    ) -> Any:
        """Return the logits [..., V] of `hidden` [..., X], or the loss of rows [M, X].

        With `targets` and `row_weights` [M]: returns the weighted sum of the rows' losses in nats, a scalar, and the
        loss of each row, [M] fp32 without gradient. A row's loss is its negative log-likelihood, or what `row_loss`
        makes of it.

        `hidden` is whole on every tensor-parallel rank. Its gradient is this rank's part of a sum over the ranks.
        """
        weight = self.weight if weight is None else weight
        assert weight is not None
        if targets is None:
            return self.logits(hidden, weight)
        return _CrossEntropy.apply(
            hidden, weight, self.bias, targets, row_weights, self, row_loss, torch.is_grad_enabled()
        )

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Return the logits of `hidden` [..., X], fp32 [..., V]."""
        return F.linear(hidden, weight, self.bias).float().masked_fill_(self.forbidden_V, float("-inf"))


class _CrossEntropy(torch.autograd.Function):
    """Σ weight · loss, whose gradients are computed in forward, while a piece's logits are in memory.

    Nothing is computed twice: backward only multiplies by the gradient of the sum. This is fused linear cross-entropy
    (Liger Kernel: Hsu et al., 2024) on megatron's vocabulary-parallel shards.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MX: Tensor,
        weight_VX: Tensor,
        bias_V: Tensor | None,
        targets_M: Tensor,
        row_weights_M: Tensor,
        layer: OutputLayer,
        row_loss: RowLoss | None,
        training: bool,
    ) -> tuple[Tensor, Tensor]:
        loss_M = torch.empty(len(targets_M), dtype=torch.float32, device=hidden_MX.device)
        grad_hidden = torch.empty_like(hidden_MX if training else hidden_MX[:0])
        grad_weight: Tensor | None = None
        grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if training and bias_V is not None else None
        piece = max(1, PIECE_BYTES // (weight_VX.shape[0] * weight_VX.element_size()))
        for start in range(0, len(targets_M), piece):
            rows = slice(start, start + piece)
            logits = product(hidden_MX[rows], weight_VX, bias_V)
            loss_M[rows], log_total = _nll(logits, targets_M[rows], layer)
            # nll = log_total − logit[target], and d log_total / d logit = softmax. The gradient of a row's loss by its
            # logits is therefore (∂nll + ∂total) · softmax − ∂nll · one_hot(target), where ∂nll and ∂total are the
            # derivatives of the row loss; they are 1 and 0 for the plain nll.
            softmax_scale = target_scale = row_weights_M[rows]
            if row_loss is not None:
                loss_M[rows], by_nll, by_total = _row_loss(row_loss, loss_M[rows], log_total)
                softmax_scale, target_scale = target_scale * (by_nll + by_total), target_scale * by_nll
            if training:
                logit_gradient_(
                    logits, targets_M[rows], layer.first_id, layer.forbidden_V, log_total, softmax_scale, target_scale
                )
                product_into(grad_hidden[rows], logits, weight_VX.t())
                grad_weight = add_weight_gradient(grad_weight, logits, hidden_MX[rows])
                if grad_bias is not None:
                    grad_bias += logits.sum(0, dtype=torch.float32)
        if training:
            # Not through `save_for_backward`: other micro-batches add to it before this backward runs, and autograd
            # refuses a saved tensor that has changed.
            ctx.total = getattr(weight_VX, "main_grad", None)
            ctx.dtypes = weight_VX.dtype, None if bias_V is None else bias_V.dtype
            # A micro-batch may have no masked row: the weight's gradient is then zero, not missing.
            grad_weight = torch.zeros_like(weight_VX) if grad_weight is None else grad_weight
            ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.mark_non_differentiable(loss_M)
        return (loss_M * row_weights_M).sum(), loss_M

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        grad_bias = None if grad_bias is None else (grad_bias * grad_loss).to(bias_dtype)
        # In place: there may be no memory for a second fp32 gradient of the whole vocabulary.
        grad_hidden = grad_hidden.mul_(grad_loss)
        if ctx.total is not None:
            ctx.total.addcmul_(grad_weight, grad_loss)
            return grad_hidden, None, grad_bias, *(None,) * 5
        return grad_hidden, grad_weight.mul_(grad_loss).to(weight_dtype), grad_bias, *(None,) * 5


def _row_loss(row_loss: RowLoss, nll_M: Tensor, log_total_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses [M], and their derivatives with respect to the nll and to log_total."""
    with torch.enable_grad():
        nll, log_total = (values.detach().clone().requires_grad_() for values in (nll_M, log_total_M))
        loss = row_loss(nll, log_total)
        if loss.shape != nll.shape:
            raise ValueError(
                f"a row loss gives shape {tuple(loss.shape)} for {len(nll)} rows: return one number for each row"
            )
        by_nll, by_total = torch.autograd.grad(loss.sum(), (nll, log_total), allow_unused=True, materialize_grads=True)
    return loss.detach(), by_nll, by_total


def _nll(logits: Tensor, targets: Tensor, layer: OutputLayer) -> tuple[Tensor, Tensor]:
    """Return the nll [M], and the log-sum-exp of the logits of all ranks [M]."""
    group = layer.tp_group
    highest, total, target_logit = row_statistics(logits, targets, layer.first_id, layer.forbidden_V)
    if group.size() > 1:
        local = highest.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        # Each rank's sum of exponentials was relative to its own maximum; exp(local − highest) makes it relative to the
        # common one. The target's logit is 0 on every rank but the one that has it, so a sum finds it.
        sums = torch.stack([total * (local - highest).exp(), target_logit])
        dist.all_reduce(sums, group=group)
        total, target_logit = sums
    log_total = highest + total.log()
    return log_total - target_logit, log_total
