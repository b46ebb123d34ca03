"""Give access to the optimiser state that ZeRO divides, as fragments of parameters.

The state consists of fp32 master weights, the states of the optimiser's family, and the moving average of the masters
(EMA). ZeRO (Rajbhandari et al., SC 2020) keeps flat fp32 partitions: each rank has one for each parameter group (with
ZeRO-3 one for each part of a group). A parameter's fragment is the range of a partition that belongs to it. A
checkpoint stores fragments as boxes of full tensors, so that a run can go on with another layout.

This is the only module that uses DeepSpeed's private names (0.19.8, pinned). They change between versions without
notice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bd3_scale.parallel.overlap import FlatGroup


@dataclass(frozen=True)
class Fragment:
    """A rank's share of one parameter: `numel` elements from `start` of the flattened parameter.

    `states` maps "master", the names of the family's states, and "ema" where an average is kept, to 1-D fp32 views of
    `numel` elements. Writing to a view changes the optimiser.
    """

    parameter: nn.Parameter
    start: int
    numel: int
    states: dict[str, Tensor]


class ZeroState:
    """The optimiser state of a DeepSpeed engine, and the moving average of its master weights.

    Args:
        engine: the engine that `deepspeed.initialize` returned.
        parameters: of the model, with the attributes that DeepSpeed has set on them.
        states: names of the family's states (see `OptimizerFamily`). They are created here, together with `step`, the
            optimiser's count: torch's optimisers create theirs at the first step, which is too late for loading.
        ema_decay: decay of the moving average of the masters, lower at first (see `ema_decay`); 0: no average.
        divided: whether data-parallel ranks have different fragments; otherwise all have the same.
    """

    def __init__(
        self,
        engine: Any,
        parameters: Sequence[Any],
        states: tuple[str, ...],
        ema_decay: float,
        *,
        divided: bool,
    ) -> None:
        # With this option DeepSpeed's `_hp_mapping` is wrong, and checkpoints would silently mix up parameters.
        assert not engine.zero_round_robin_gradients(), "round-robin gradients make DeepSpeed's fragment map wrong"
        assert not {"master", "ema", "step"} & set(states), f"{states} are names of what every run keeps"
        self._engine, self._parameters, self._states = engine, parameters, states
        self._ema_decay = ema_decay
        self.divided = divided
        self.step = 0  # updates applied
        self._ema = [flat.detach().clone() for flat in self._masters] if ema_decay else []
        for flat in self._masters:
            state = engine.basic_optimizer.state[flat]
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            state.update({name: torch.zeros_like(flat) for name in states})

    @property
    def _divides_weights(self) -> bool:
        return int(self._engine.zero_optimization_stage()) == 3

    @property
    def _masters(self) -> list[Tensor]:
        optimizer = self._engine.optimizer
        masters: list[Tensor] = (
            optimizer.fp32_partitioned_groups_flat
            if self._divides_weights
            else optimizer.single_partition_of_fp32_groups
        )
        return masters

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the states of every fragment."""
        return ("master", *self._states, *(("ema",) if self._ema else ()))

    def fragments(self) -> Iterator[Fragment]:
        """Yield this rank's fragments; a parameter of which the rank has no element is left out."""
        for parameter, start, flat, own_start, numel in self._locations():
            master = self._masters[flat]
            kept = self._engine.basic_optimizer.state[master]
            flats = {"master": master.detach()} | {name: kept[name] for name in self._states}
            if self._ema:
                flats["ema"] = self._ema[flat]
            states = {name: values.narrow(0, own_start, numel) for name, values in flats.items()}
            yield Fragment(parameter, start, numel, states)

    def _locations(self) -> Iterator[tuple[nn.Parameter, int, int, int, int]]:
        """Yield each fragment: parameter, start in it, number of the flat partition, start in that, and length."""
        if not self._divides_weights:
            # lp and hp are DeepSpeed's "low precision" weights and "high precision" masters.
            for parameter in self._parameters:
                mapping = parameter._hp_mapping
                if mapping is not None:
                    within, partition = mapping.lp_fragment_address, mapping.hp_fragment_address
                    yield parameter, within.start, mapping.param_group_index, partition.start, partition.numel
            return
        flats = {master.untyped_storage()._cdata: flat for flat, master in enumerate(self._masters)}
        for parameter in self._parameters:
            view = _local_master(parameter)
            start = int(parameter.partition_numel()) * dist.get_rank(parameter.ds_process_group)
            # The partition of the last rank is padded; the padding belongs to no fragment.
            numel = min(view.numel(), int(parameter.ds_numel) - start)
            if numel > 0:
                flat = flats[view.untyped_storage()._cdata]
                own_start = int(view.storage_offset()) - int(self._masters[flat].storage_offset())
                yield parameter, start, flat, own_start, numel

    def loaded(self, step: int) -> None:
        """Complete a load, after states were written into the fragments' views: set the step, recast the weights."""
        self.step = step
        # torch's optimisers count steps in their states, apex's in its parameter groups.
        for flat in self._masters:
            self._engine.basic_optimizer.state[flat]["step"].fill_(step)
        for group in self._engine.basic_optimizer.param_groups:
            group["step"] = step
        self._recast()

    @torch.no_grad()
    def stepped(self) -> None:
        """Count an applied update, and move the average towards the masters."""
        self.step += 1
        if not self._ema:
            return
        share = 1.0 - ema_decay(self._ema_decay, self.step)
        for average, master in zip(self._ema, self._masters, strict=True):
            average.lerp_(master, share)

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """Replace the model's weights by the moving average inside, and restore them bitwise afterwards."""
        if not self._ema:
            yield
            return
        kept = [master.detach().clone() for master in self._masters]
        self._set_masters(self._ema)
        yield
        # Deliberately not in a `finally`: recasting is collective, and after an exception on one rank the others are
        # elsewhere, so that it would hang.
        self._set_masters(kept)

    @torch.no_grad()
    def _set_masters(self, values: list[Tensor]) -> None:
        for master, value in zip(self._masters, values, strict=True):
            master.copy_(value)
        self._recast()

    @torch.no_grad()
    def _recast(self) -> None:
        optimizer = self._engine.optimizer
        if not self._divides_weights:
            optimizer.update_lp_params()
            return
        # A forward without gradients leaves weights gathered, and the next one would use these old values: partition
        # them first. Small ("persistent") weights are always gathered and must be gathered anew.
        optimizer._partition_all_parameters()
        whole = optimizer.persistent_parameters
        if whole:
            whole[0].partition(whole)
        for parameter in self._parameters:
            parameter.ds_tensor.data.copy_(_local_master(parameter))
        if whole:
            whole[0].all_gather(whole)


class FlatZero:
    """ZeRO 1 or 2 of a DeepSpeed engine, with its reduction of gradients and gathering of weights replaced.

    DeepSpeed's reduction starts after the last micro-batch and passes fp32 gradients through a bucket in the model's
    precision, which rounds them. Its gathering waits for all weights before the next step begins.
    """

    def __init__(self, engine: Any) -> None:
        self._optimizer = engine.optimizer
        # DeepSpeed's hooks on gradients would copy and reduce each gradient a second time.
        for hook in self._optimizer._grad_acc_hooks:
            hook.remove()

    def groups(self, ranks: dist.ProcessGroup, ranks_of_spread: dist.ProcessGroup) -> list[FlatGroup]:
        """Return the groups of parameters in ZeRO's flat buffers.

        ranks: the ranks that have the same weights; ranks_of_spread: those that have the same experts.
        """
        optimizer = self._optimizer
        assert not any(map(any, optimizer.round_robin_bit16_padding)), "parameters lie one after the other"
        return [
            FlatGroup(
                list(zip(parameters, optimizer.round_robin_bit16_offsets[number], strict=True)),
                optimizer.bit16_groups_flat[number],
                int(optimizer.partition_size[number]),
                ranks if getattr(parameters[0], "allreduce", True) else ranks_of_spread,
            )
            for number, parameters in enumerate(optimizer.round_robin_bit16_groups)
        ]

    def take_gradients(self, groups: Sequence[FlatGroup], sums: Sequence[Tensor]) -> None:
        """Let the next update use `sums`, the reduced gradients of each group."""
        optimizer = self._optimizer
        for number, (group, flat) in enumerate(zip(groups, sums, strict=True)):
            first = group.share * dist.get_rank(group=optimizer.real_dp_process_group[number])
            local = [
                flat[max(start, first) : min(start + parameter.numel(), first + group.share)]
                for parameter, start in group.parameters
                if start < first + group.share and start + parameter.numel() > first
            ]
            assert len(local) == len(optimizer.params_in_partition[number])
            optimizer.averaged_gradients[number] = _Partition(local, flat[first : first + group.share])

    def sum_norm_over(self, groups: Sequence[FlatGroup], everyone: Sequence[dist.ProcessGroup]) -> None:
        """Compute the global gradient norm over the ranks of `everyone`, group after group, for undivided states.

        At ZeRO stage 0 DeepSpeed is given groups of one rank, so it would leave out the experts of other ranks.
        """
        optimizer = self._optimizer

        def norm() -> Tensor:
            total = torch.zeros((), dtype=torch.float64, device=groups[0].weights.device)
            for number, group in enumerate(groups):
                local = zip(optimizer.averaged_gradients[number], optimizer.params_in_partition[number], strict=True)
                for gradient, parameter in local:
                    if not getattr(parameter, "ds_pipe_replicated", False) and (
                        getattr(parameter, "tensor_model_parallel", False) or optimizer.model_parallel_rank == 0
                    ):
                        # Each of group.ranks adds the same square.
                        total += gradient.double().square().sum() / group.ranks.size()
            for ranks in everyone:
                dist.all_reduce(total, group=ranks)
            return total.sqrt().float()

        optimizer.scaled_global_norm = norm
        # If a gradient of one rank is not finite, the norm is not on any. DeepSpeed's own check sees this rank only.
        optimizer.check_overflow = lambda **_: None

    @contextmanager
    def gathering_by(self, gather: Callable[[], None]) -> Iterator[None]:
        """Replace, inside, DeepSpeed's gathering of updated weights by `gather`."""
        from deepspeed.runtime.zero import stage_1_and_2

        original = stage_1_and_2.all_gather_dp_groups
        stage_1_and_2.all_gather_dp_groups = lambda **_: gather()
        try:
            yield
        finally:
            stage_1_and_2.all_gather_dp_groups = original


class _Partition(list):
    """A rank's gradients of one group, as a list and as one flat tensor: the form that DeepSpeed's optimiser reads."""

    def __init__(self, gradients: list[Tensor], flat: Tensor) -> None:
        super().__init__(gradients)
        self.flat_partition = flat


@contextmanager
def spreading_experts(name: str, ranks: dist.ProcessGroup) -> Iterator[None]:
    """Let ZeRO 1 and 2 optimisers made inside divide the parameter groups called `name` among `ranks`.

    DeepSpeed does this only for its own layers of experts. It must also not broadcast the first rank's weights to all
    data-parallel ranks, as it does at its start: ranks have different experts, and equal weights are equal already.
    """
    from deepspeed.runtime import engine

    original, broadcast = engine.DeepSpeedZeroOptimizer, engine.DeepSpeedEngine._broadcast_model

    def with_experts(*args: Any, **options: Any) -> Any:
        groups = {"expert_parallel_group": {name: ranks}, "expert_data_parallel_group": {name: ranks}}
        return original(*args, **options | groups | {"has_moe_layers": True})

    engine.DeepSpeedZeroOptimizer, engine.DeepSpeedEngine._broadcast_model = with_experts, lambda _: None
    try:
        yield
    finally:
        engine.DeepSpeedZeroOptimizer, engine.DeepSpeedEngine._broadcast_model = original, broadcast


def ema_decay(decay: float, updates: int) -> float:
    """Return the decay of the moving average at update n (from 1): min(decay, (1 + n) / (10 + n)).

    It is lower at first, so that the average soon forgets the initial weights. As in the official BD3-LM code
    (models/ema.py, from torch_ema).
    """
    return min(decay, (1 + updates) / (10 + updates))


def _local_master(parameter: nn.Parameter) -> Tensor:
    """Return a view of this rank's part of a parameter's fp32 master under ZeRO-3, padding included."""
    from deepspeed.utils import safe_get_local_fp32_param

    return safe_get_local_fp32_param(parameter)
