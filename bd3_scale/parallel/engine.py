"""Run optimiser steps: megatron-core's schedule runs the micro-batches, DeepSpeed's ZeRO reduces, clips and updates."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from bd3_scale.model.build import Chunks, build_model
from bd3_scale.model.layout import parameter_layouts
from bd3_scale.model.rows import ModelInputs, to_device
from bd3_scale.observe.flops import model_flops
from bd3_scale.parallel.balance import Balance
from bd3_scale.parallel.groups import DeepSpeedTopology, ProcessGroups
from bd3_scale.parallel.optimizer import OptimizerFamily
from bd3_scale.parallel.overlap import GradientSums, WeightGather
from bd3_scale.parallel.parameter_groups import EXPERTS, parameter_groups
from bd3_scale.parallel.schedule import forward_backward
from bd3_scale.parallel.timing import StepTimer
from bd3_scale.parallel.zero import FlatZero, ZeroState, spreading_experts
from bd3_scale.recipe.schema import ModelRecipe, OptimizerRecipe, ParallelRecipe, Recipe
from bd3_scale.recipe.vocabulary import Vocabulary
from bd3_scale.registry import optimizers

# Number of elements of a bucket of gradients that are reduced outside ZeRO.
BUCKET_ELEMENTS = 1 << 26
# The most elements of ZeRO's bucket. DeepSpeed allocates all of it (1 GB in bf16) even for a small model, so a smaller
# model gets a smaller bucket below.
_ZERO_BUCKET_ELEMENTS = 500_000_000
# ZeRO-3 keeps weights with fewer elements whole on every rank: gathering them would take time and save little memory.
WHOLE_BELOW = 100_000


@dataclass(frozen=True)
class StepResult:
    """The result of an optimiser step, equal on all ranks but for `seconds`.

    Attributes:
        loss: the global loss of the step, in nats a token.
        groups: for each loss group of sequences (block size and source) the sum of the losses and the number of tokens.
        grad_norm: the global gradient norm before clipping.
        lr: the learning rate.
        flops: the FLOPs that the step needed, over all ranks (see `model_flops`).
        applied: false where a gradient of any rank was not finite; then weights and optimiser are unchanged everywhere.
        routed: the number of rows that each layer with experts sent to each expert, int64 [layers, 2, experts] of
            noisy and of clean rows, on the host.
        seconds: the time of the parts of the step on this rank, by name; on a GPU the time of the device, except
            `data`, which is time of the host.
    """

    loss: float
    groups: tuple[tuple[float, float], ...]
    grad_norm: float
    lr: float
    flops: float
    applied: bool = True
    routed: Tensor | None = None
    seconds: Mapping[str, float] = field(default_factory=dict, compare=False)

    def loss_of(self, groups: Iterable[int]) -> float | None:
        """Return the loss in nats a token over some groups of sequences; None: they had no token in this step."""
        losses, tokens = zip(*(self.groups[group] for group in groups), strict=True)
        return sum(losses) / sum(tokens) if sum(tokens) else None


class TrainingEngine:
    """A rank's pipeline chunks with their ZeRO optimiser; `layouts` says where their parameters lie in the model.

    The loss is divided once, by the number of trained data tokens of the global batch, which is known before the
    forward. Dividing by the number of masked tokens of a rank or a micro-batch would weigh tokens unequally, because
    these numbers differ, and would bias the gradient.
    """

    def __init__(
        self, chunks: Chunks, groups: ProcessGroups, optimizer: OptimizerRecipe, parallel: ParallelRecipe
    ) -> None:
        self._chunks = chunks
        self.groups = groups
        # Before DeepSpeed is initialised: ZeRO-3 then leaves parameters without a shape.
        self.layouts = parameter_layouts(chunks)
        self._family: OptimizerFamily = optimizers.get(optimizer.family)(optimizer)
        self._engine = _initialise_deepspeed(chunks, groups, self._family, parallel)
        self._zero = ZeroState(
            self._engine,
            [parameter for chunk in chunks for parameter in chunk.parameters()],
            self._family.states,
            optimizer.ema_decay,
            divided=parallel.zero_stage > 0,
        )
        self._balance = Balance(chunks)
        self._flat: FlatZero | None = None
        self._sums: GradientSums | None = None
        self._gather: WeightGather | None = None
        if parallel.zero_stage < 3 and not parallel.offload_optimizer:
            self._take_over(divided=parallel.zero_stage > 0)

    def _take_over(self, *, divided: bool) -> None:
        """Replace DeepSpeed's gradient reduction and weight gathering by ones that overlap with computation.

        DeepSpeed's own run after the last backward and after the update, while nothing else is computed.
        """
        self._flat = FlatZero(self._engine)
        flat = self._flat.groups(self.groups.dp_cp, self.groups.expt_dp)
        late = [*self._partial_over_tp(), *self._tied()]
        self._sums = GradientSums(flat, self._chunks, owned=divided, late=late)
        self._gather = WeightGather(flat, self._chunks) if divided and self.groups.dp_cp.size() > 1 else None
        if not divided and self.groups.ep.size() > 1:
            self._flat.sum_norm_over(flat, (self.groups.dp_cp, self.groups.mp))

    @property
    def _device(self) -> torch.device:
        return next(self._chunks[0].parameters()).device

    @property
    def chunks(self) -> Chunks:
        """Return this rank's chunks, after all of their weights have been gathered."""
        if self._gather is not None:
            self._gather.wait()
        return self._chunks

    @property
    def zero(self) -> ZeroState:
        """Return the optimiser's state, after all weights have been gathered.

        Without the wait, weights that still arrive could overwrite what a caller writes.
        """
        if self._gather is not None:
            self._gather.wait()
        return self._zero

    @property
    def gradient_sums(self) -> Sequence[Tensor]:
        """Return the fp32 sums of gradients that live as long as the engine; empty where DeepSpeed keeps the sums."""
        return [] if self._sums is None else self._sums.sums

    @property
    def optimizer_name(self) -> str:
        """Return family, implementation and number of parameter groups of the optimiser, for people."""
        optimizer = self._engine.basic_optimizer
        implementation = self._family.implementation(optimizer)
        name = f"{self._family.recipe.family}{f' ({implementation})' * bool(implementation)}"
        return f"{name}, {len(optimizer.param_groups)} groups"

    def step(
        self,
        micro_batches: Sequence[ModelInputs],
        *,
        tokens: int,
        lr: float,
        num_groups: int = 1,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> StepResult:
        """Run forward and backward over this rank's micro-batches, then one update with learning rate `lr`.

        `tokens` is the number of data tokens of the global batch that are trained on, over all ranks. `num_groups` is
        the number of loss groups, pairs of block size and source. `meanwhile` is work that the host does while a GPU
        computes gradients.
        """
        timer = StepTimer(self._device)
        start = timer.point()
        losses = self.gradients(micro_batches, tokens=tokens, num_groups=num_groups)
        timer.part("forward_backward", start, timer.point())
        # So far kernels are only launched. `update` is the first to wait: it reads whether all gradients are finite.
        began = time.perf_counter()
        meanwhile()
        data_seconds = time.perf_counter() - began
        start = timer.point()
        local = torch.tensor(
            [*_tokens_by_group(micro_batches, num_groups), self.flops(micro_batches)], dtype=losses.dtype
        )
        # Losses and routing counts lie on single pipeline stages and are summed over them; `local` is on every stage.
        totals = torch.cat([losses, *self._balance.counts(micro_batches[0].num_noisy), to_device(local, losses.device)])
        of_stages = totals[: len(totals) - len(local)]
        # These go before the update, because a group's collectives run in order. After it they would wait for all
        # gathers of updated weights, and so would the host, and no gather could overlap with the next forward.
        for tensor, group in ((totals, self.groups.dp_cp), (of_stages, self.groups.pp)):
            # An all-reduce of one rank changes nothing and costs a launch all the same.
            if group.size() > 1:
                dist.all_reduce(tensor, group=group)
        grad_norm, applied = self.update(lr)
        timer.part("optimizer", start, timer.point())
        if applied:
            self._balance.move(of_stages[num_groups:])
        losses = totals[:num_groups]
        # One copy to the host for all numbers: every `tolist` waits for the device.
        *values, flops, loss, norm = torch.cat([totals, losses.sum()[None], grad_norm[None]]).tolist()
        by_group = tuple(zip(values[:num_groups], values[-num_groups:], strict=True))
        routed = self._balance.by_layer(values[num_groups:-num_groups])
        seconds = {**timer.seconds(), "data": data_seconds}
        return StepResult(loss / tokens, by_group, norm, lr, flops, applied, routed, seconds)

    def gradients(self, micro_batches: Sequence[ModelInputs], *, tokens: int, num_groups: int = 1) -> Tensor:
        """Run forward and backward of all micro-batches and ZeRO's reduction.

        Returns this rank's sum of losses for each loss group of sequences, float64 [num_groups].
        """
        self._engine.train()
        if self._sums is None:
            # DeepSpeed averages gradients over the ranks that hold the same weights; the sum is wanted.
            scale = self.groups.dp_cp.size() / tokens
            collecting = self._engine.coalesce_grad_reduction()
        else:
            scale, collecting = 1 / tokens, self._sums.collect(len(micro_batches))
        sequences = sum(len(inputs.tokens) for inputs in micro_batches) * self.groups.dp.size()
        # Auxiliary losses of experts are means over sequences, while the loss is a mean over tokens.
        self._balance.begin_step(scale * tokens / sequences)
        with collecting:
            losses = forward_backward(self._chunks, micro_batches, self.groups, scale, num_groups=num_groups)
            _all_reduce_gradients(self._partial_over_tp(), self.groups.tp)
            _all_reduce_gradients(self._tied(), self.groups.embd)
        if self._flat is not None and self._sums is not None:
            self._flat.take_gradients(self._sums.groups, self._sums.sums)
        return losses

    def update(self, lr: float) -> tuple[Tensor, bool]:
        """Clip the gradients and update the weights, unless a gradient of any rank is not finite.

        Returns the global gradient norm before clipping, float64 [], and whether the update was applied.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        with self._gathering():
            self._engine.step()
        applied = not self._engine.optimizer.overflow
        if applied:
            self._zero.stepped()
        norm = self._engine.get_global_grad_norm() if applied else math.inf
        return torch.as_tensor(norm, dtype=torch.float64, device=self._device), applied

    def flops(self, micro_batches: Sequence[ModelInputs], model: ModelRecipe | None = None) -> int:
        """Return the FLOPs of the whole model for this rank's positions; see `model_flops`.

        model: count for this model instead, on the same rows.
        """
        return sum(
            model_flops(
                model or self._chunks[0].recipe,
                self._chunks[0].vocabulary.size,
                noisy_rows=inputs.num_noisy * inputs.positions.numel(),
                clean_rows=inputs.tokens.numel() - inputs.num_noisy * inputs.positions.numel(),
                noisy_pairs=inputs.noisy_pairs,
                clean_pairs=inputs.clean_pairs,
                head_rows=len(inputs.head_rows),
            )
            for inputs in micro_batches
        )

    def _gathering(self) -> AbstractContextManager[None]:
        if self._flat is None or self._gather is None:
            return nullcontext()
        return self._flat.gathering_by(self._gather.begin)

    def _partial_over_tp(self) -> list[nn.Parameter]:
        """Return the parameters whose gradients must be summed over tensor-parallel ranks, which ZeRO does not do."""
        return [p for chunk in self._chunks for p in chunk.parameters() if getattr(p, "partial_over_tp", False)]

    def _tied(self) -> list[nn.Parameter]:
        """Return this rank's copies of the tied embedding, which two pipeline stages hold."""
        return [chunk.tied_weight for chunk in self._chunks if chunk.tied_weight is not None]


def open_engine(
    recipe: Recipe, vocabulary: Vocabulary, groups: ProcessGroups, *, device: torch.device, seed: int | None
) -> TrainingEngine:
    """Build this rank's part of a recipe's model with its optimiser (collective); see `build_model`."""
    chunks = build_model(
        recipe.model,
        vocabulary,
        groups,
        parallel=recipe.parallel,
        dtype=torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32,
        device=device,
        seed=seed,
        deterministic=recipe.deterministic,
        attention_backend=recipe.attention_backend,
        recompute=recipe.recomputation,
    )
    return TrainingEngine(chunks, groups, recipe.optimizer, recipe.parallel)


def _tokens_by_group(micro_batches: Sequence[ModelInputs], num_groups: int) -> list[int]:
    """Count the tokens of this rank's positions that are trained on, by the loss group of their sequence."""
    counts = [0] * num_groups
    for inputs in micro_batches:
        trained = inputs.trained_tokens
        for group, count in zip(inputs.loss_groups or [0] * len(trained), trained, strict=True):
            counts[group] += count
    return counts


def _all_reduce_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Sum gradients over `group` in fp32, in buckets."""
    if group is None or group.size() == 1:
        return
    for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
        if len(bucket) == 1 and bucket[0].dtype == torch.float32:
            dist.all_reduce(bucket[0], group=group)
            continue
        flat = _flatten_dense_tensors([gradient.float() for gradient in bucket])
        dist.all_reduce(flat, group=group)
        for gradient, summed in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
            gradient.copy_(summed)


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(g.numel() for g in bucket) + gradient.numel() > BUCKET_ELEMENTS:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def _initialise_deepspeed(
    chunks: Chunks, groups: ProcessGroups, family: OptimizerFamily, parallel: ParallelRecipe
) -> Any:
    device = next(chunks[0].parameters()).device
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # DeepSpeed compiles this op at first use. A compilation that is killed leaves a lock file behind, on which all
    # later runs wait for ever. gloo does the same work.
    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)
    bf16 = chunks[0].config.params_dtype == torch.bfloat16
    of_parameters, placeholders = parameter_groups(chunks, family.recipe, groups.pp)
    parts: list[nn.Module] = [*chunks, *([nn.ParameterList(placeholders)] if placeholders else [])]
    # A single chunk is passed as it is, not in a list: ZeRO-3 gathers weights in hooks on the forward of the module
    # that it is given, and a ModuleList has no forward.
    model = parts[0] if len(parts) == 1 else nn.ModuleList(parts)
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": device.type == "cuda"}}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": family.recipe.clip_grad_norm,
        "bf16": {"enabled": bf16},
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": max(1, parallel.zero_stage),
            "overlap_comm": False,
            "reduce_bucket_size": min(_ZERO_BUCKET_ELEMENTS, sum(p.numel() for p in model.parameters())),
            "stage3_param_persistence_threshold": WHOLE_BELOW,
            **(offload if parallel.offload_optimizer else {}),
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 60,
        # The throughput timer synchronises with the GPU before every micro-batch, from the third step on.
        "timers": {"throughput": {"enabled": False}},
    }
    # ZeRO-3 updates in several calls a step. apex counts each call as a step, which makes Adam's bias correction wrong.
    one_call_on_gpu = device.type == "cuda" and not parallel.offload_optimizer and parallel.zero_stage < 3
    topology = DeepSpeedTopology(groups, divide_optimizer=parallel.zero_stage > 0)
    spread = groups.ep.size() > 1 and any(group.get("moe") for group in of_parameters)
    with spreading_experts(EXPERTS, topology.sharers_of(groups.expt_dp)) if spread else nullcontext():
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=family.build(of_parameters, on_gpu=one_call_on_gpu),
            config=config,
            mpu=topology,
            dist_init_required=False,
        )
    if bf16:
        # With coalesced reduction DeepSpeed refuses `grad_accum_dtype` (ZeRO-1) or ignores it silently (ZeRO-2 and 3),
        # and bf16 sums over micro-batches lose small gradients. This makes autograd itself accumulate in fp32.
        for parameter in model.parameters():
            parameter.grad_dtype = torch.float32
    return engine
