"""Compute the experts of a mixture, each on the rows that were sent to it.

Legend: M rows in the order of their experts, e experts of this rank, F channels of an expert on this tensor-parallel
rank, X hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from bd3_scale.fused.swiglu import swiglu, swiglu_backward
from bd3_scale.model.block import Part
from bd3_scale.model.dispatch import on_host
from bd3_scale.model.products import add_weight_gradient, product_into
from bd3_scale.recipe.schema import ModelRecipe


class Experts(Part):
    """SwiGLU experts (Shazeer, 2020); the weights of all experts of a layer are two tensors.

    Experts are split over expert-parallel ranks, and the channels of each expert over tensor-parallel ranks.
    """

    def __init__(self, model: ModelRecipe, config: TransformerConfig, groups: ProcessGroupCollection) -> None:
        super().__init__(config, groups.tp)
        assert model.moe is not None
        self.ep_group, self.replicas = groups.ep, groups.expt_dp
        experts = model.moe.num_experts // groups.ep.size()
        width = model.moe.ffn_hidden_size // groups.tp.size()
        # Gate and up projection are an axis of their own. A rank's share of an expert is then one box of the whole
        # tensor, and the checkpoint can change the layout without special cases.
        self.linear_fc1 = _Weight((experts, 2, width, model.hidden_size), config)
        self.linear_fc2 = _Weight((experts, model.hidden_size, width), config)
        for weight, dim in ((self.linear_fc1.weight, 2), (self.linear_fc2.weight, 2)):
            set_tensor_model_parallel_attributes(weight, is_parallel=groups.tp.size() > 1, dim=dim, stride=1)
            # The mark of megatron-core and DeepSpeed for weights that not all data-parallel ranks have.
            weight.allreduce = groups.ep.size() == 1  # type: ignore[attr-defined]

    def forward(self, x_MX: Tensor, weights_M: Tensor, counts: Tensor) -> Tensor:
        """Return [M, X]: the output of each row's expert, times the row's weight.

        weights_M: fp32; counts: int64 [e], rows of each expert. Under tensor parallelism the result is a summand, to be
        summed over ranks.
        """
        fc1, fc2 = self.linear_fc1.weight.flatten(1, 2), self.linear_fc2.weight
        totals = tuple(getattr(layer.weight, "main_grad", None) for layer in (self.linear_fc1, self.linear_fc2))
        out: Tensor = _Products.apply(x_MX, weights_M, counts, fc1, fc2, totals)
        return out

    def inner(self, x_MX: Tensor, weights_M: Tensor, counts: Tensor) -> Tensor:
        """Return the input of `linear_fc2`, [M, F], for the arguments of `forward`."""
        wide = grouped_product(x_MX, self.linear_fc1.weight.flatten(1, 2), counts)
        return _weighted(swiglu(wide), weights_M)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Place this rank's boxes of the whole tensors: its experts, and its channels of each."""
        axis = len(sharded_offsets)
        of_rank = (axis, self.ep_group.rank(), self.ep_group.size())
        entries = {}
        for name, layer, channels in (("linear_fc1", self.linear_fc1, 2), ("linear_fc2", self.linear_fc2, 2)):
            key = f"{prefix}{name}.weight"
            entries[key] = ShardedTensor.from_rank_offsets(
                key,
                layer.weight,
                *sharded_offsets,
                of_rank,
                (axis + channels, self.tp_group.rank(), self.tp_group.size()),
                replica_id=(0, 0, self.replicas.rank()),
                prepend_axis_num=axis,
            )
        return entries


class _Weight(nn.Module):
    """A weight of all experts of a rank; as a module, so that its name ends in `.weight` like that of a linear."""

    def __init__(self, shape: tuple[int, ...], config: TransformerConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, dtype=config.params_dtype))


class _Products(torch.autograd.Function):
    """w · down(silu(gate x) · up x).

    The weight w multiplies the input of the down projection and not its output, which is the same and has fewer
    channels to keep. Backward computes the activation again instead of keeping it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_MX: Tensor,
        weights_M: Tensor,
        counts: Tensor,
        fc1: Tensor,
        fc2: Tensor,
        totals: tuple[Tensor | None, Tensor | None],
    ) -> Tensor:
        wide = grouped_product(x_MX, fc1, counts)
        ctx.save_for_backward(x_MX, weights_M, counts, wide, fc1, fc2)
        # Not through `save_for_backward`: other micro-batches add to them before this backward runs, and autograd
        # refuses a saved tensor that has changed.
        ctx.totals = totals
        return grouped_product(_weighted(swiglu(wide), weights_M), fc2, counts)

    @staticmethod
    def backward(ctx: Any, gradient_MX: Tensor) -> tuple[Tensor | None, ...]:
        x_MX, weights_M, counts, wide, fc1, fc2 = ctx.saved_tensors
        gradient_MX = gradient_MX.contiguous()
        of_weighted = grouped_product(gradient_MX, fc2.transpose(1, 2), counts)
        of_wide, activated = swiglu_backward(_weighted(of_weighted, weights_M), wide)
        # In fp32, as the router's scores are: this is the only gradient by which the router learns from the loss.
        of_weights = torch.linalg.vecdot(of_weighted.float(), activated.float()).to(weights_M.dtype)
        of_fc2 = _weight_gradient(ctx.totals[1], gradient_MX, _weighted(activated, weights_M), counts, fc2)
        of_fc1 = _weight_gradient(ctx.totals[0], of_wide, x_MX, counts, fc1)
        of_x = grouped_product(of_wide, fc1.transpose(1, 2), counts) if ctx.needs_input_grad[0] else None
        return of_x, of_weights, None, of_fc1, of_fc2, None


def _weighted(rows: Tensor, weights_M: Tensor) -> Tensor:
    return (rows * weights_M[:, None]).to(rows.dtype)


def grouped_product(x_MK: Tensor, weights_eNK: Tensor, counts: Tensor) -> Tensor:
    """Return [M, N]: each row times the weight of its expert; rows are in the order of experts. counts: int64 [e]."""
    if _in_one_call(weights_eNK):
        return torch._grouped_mm(x_MK, weights_eNK.transpose(1, 2), offs=_ends(counts))
    out = x_MK.new_empty(len(x_MK), weights_eNK.shape[1])
    for expert, rows in rows_of(counts, len(x_MK)):
        product_into(out[rows], x_MK[rows], weights_eNK[expert])
    return out


def _weight_gradient(
    total: Tensor | None, gradient_MN: Tensor, x_MK: Tensor, counts: Tensor, weights_eNK: Tensor
) -> Tensor | None:
    """Return the gradient [e, N, K] of `grouped_product`'s weights; None: it was added to `total`, fp32."""
    if _in_one_call(weights_eNK):
        # Rounded once a micro-batch: no library adds such products to an fp32 sum as it writes.
        gradient = torch._grouped_mm(gradient_MN.t(), x_MK, offs=_ends(counts))
        if total is None:
            return gradient
        total.view_as(gradient).add_(gradient)
        return None
    sums = torch.zeros_like(weights_eNK) if total is None else total.view_as(weights_eNK)
    for expert, rows in rows_of(counts, len(x_MK)):
        add_weight_gradient(sums[expert], gradient_MN[rows], x_MK[rows])
    return sums if total is None else None


def _in_one_call(weights_eNK: Tensor) -> bool:
    """Say whether `torch._grouped_mm` takes the products of all experts in one kernel.

    It takes bf16 on CUDA, with rows that begin at multiples of 16 bytes.
    """
    aligned = not any(size % 8 for size in weights_eNK.shape[1:])
    return weights_eNK.is_cuda and weights_eNK.dtype == torch.bfloat16 and aligned


def _ends(counts: Tensor) -> Tensor:
    return counts.cumsum(0).to(torch.int32)


def rows_of(counts: Tensor, total: int) -> Iterator[tuple[int, slice]]:
    """Yield each expert that has rows, with the slice of its rows."""
    start = 0
    for expert, count in enumerate(on_host(counts, total)):
        if count:
            yield expert, slice(start, start + count)
        start += count
