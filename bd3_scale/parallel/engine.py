"""One optimiser step: megatron-core's schedule runs the micro-batches, DeepSpeed's ZeRO reduces, clips and updates."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from bd3_scale.model.transformer import BlockDiffusionTransformer
from bd3_scale.parallel.groups import DeepSpeedTopology, ProcessGroups
from bd3_scale.parallel.zero import ZeroState
from bd3_scale.recipe.schema import OptimizerRecipe, ParallelRecipe


@dataclass(frozen=True)
class StepResult:
    """`loss`: the global loss of the step, in nats a token; `grad_norm`: the global gradient norm before clipping;
    `lr`: the learning rate.

    Where the norm is not finite, DeepSpeed has left the weights alone.
    """

    loss: float
    grad_norm: float
    lr: float


class TrainingEngine:
    """A model with its ZeRO optimiser.

    `loss_sum(model, micro_batch)` returns the loss numerator of a micro-batch, a scalar fp32 tensor. It is divided
    once by the global batch's number of data tokens (DESIGN §4.3), so that uneven numbers of masked tokens bias
    nothing.
    """

    def __init__(
        self,
        model: BlockDiffusionTransformer,
        groups: ProcessGroups,
        optimizer: OptimizerRecipe,
        parallel: ParallelRecipe,
        loss_sum: Callable[[BlockDiffusionTransformer, Any], Tensor],
    ) -> None:
        self.groups = groups
        self._loss_sum = loss_sum
        self._engine = _initialise_deepspeed(model, groups, optimizer, parallel)
        self.zero = ZeroState(self._engine, optimizer.ema_decay)

    @property
    def model(self) -> BlockDiffusionTransformer:
        model: BlockDiffusionTransformer = self._engine.module
        return model

    def step(self, micro_batches: Sequence[Any], *, tokens: int, lr: float) -> StepResult:
        """Forward and backward over this rank's micro-batches, then one update with learning rate `lr`.

        `tokens` is the number of data tokens of the global batch, over all ranks.
        """
        # megatron divides by the number of micro-batches, DeepSpeed averages over the data-parallel ranks.
        scale = len(micro_batches) * self.groups.dp_cp.size() / tokens

        def forward_step(batches: Any, model: BlockDiffusionTransformer) -> tuple[Tensor, Callable[[Tensor], Any]]:
            total = self._loss_sum(model, next(batches))
            # megatron divides the loss in place: keep a copy of the numerator.
            return total, lambda total: (total * scale, total.detach().double().clone())

        self._engine.train()
        with self._engine.coalesce_grad_reduction():
            numerators = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter(micro_batches),
                model=self.model,
                num_microbatches=len(micro_batches),
                seq_length=0,
                micro_batch_size=0,
                forward_only=False,
            )
            self._sum_partial_gradients()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        if not self._engine.optimizer.overflow:
            self.zero.update_ema()
        loss = torch.stack(numerators).sum()
        dist.all_reduce(loss, group=self.groups.dp_cp)
        return StepResult(loss=float(loss) / tokens, grad_norm=float(self._engine.get_global_grad_norm()), lr=lr)

    def _sum_partial_gradients(self) -> None:
        """Add up, over tensor-parallel ranks, the gradients of replicated weights that each saw a part of the heads."""
        if self.groups.tp.size() == 1:
            return
        gradients = [
            p.grad for p in self.model.parameters() if getattr(p, "partial_over_tp", False) and p.grad is not None
        ]
        if gradients:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat, group=self.groups.tp)
            for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(summed.view_as(gradient))


def _initialise_deepspeed(
    model: BlockDiffusionTransformer,
    groups: ProcessGroups,
    optimizer: OptimizerRecipe,
    parallel: ParallelRecipe,
) -> Any:
    device = next(model.parameters()).device
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # A killed build of this op leaves a lock that later runs wait on for ever; gloo does the same work.
    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)
    bf16 = model.config.params_dtype == torch.bfloat16
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.clip_grad_norm,
        "bf16": {"enabled": bf16},
        "communication_data_type": "fp32",
        "zero_optimization": {"stage": parallel.zero_stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 60,
    }
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=_adamw(model, optimizer),
        config=config,
        mpu=DeepSpeedTopology(groups),
        dist_init_required=False,
    )
    if bf16:
        # DeepSpeed's grad_accum_dtype is refused or ignored with coalesced reduction; this makes autograd itself sum
        # in fp32.
        for parameter in model.parameters():
            parameter.grad_dtype = torch.float32
    return engine


def _adamw(model: BlockDiffusionTransformer, optimizer: OptimizerRecipe) -> torch.optim.AdamW:
    """AdamW whose weight decay leaves norms and biases alone."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": optimizer.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=optimizer.lr,
        betas=optimizer.betas,
        eps=optimizer.eps,
        fused=True,
    )
