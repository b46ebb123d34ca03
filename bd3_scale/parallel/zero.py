"""The optimiser state that ZeRO divides: fp32 masters, what the optimiser's family keeps, and the moving average, as
fragments of parameters.

The only place that knows DeepSpeed's private names (0.19.8). ZeRO keeps flat fp32 partitions, one a rank for each
parameter group (ZeRO-3: for each part of one); a parameter's fragment is the stretch of one that belongs to it.
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

    `states` maps master, the states of the optimiser's family and, where kept, ema to 1-D fp32 views of that many
    elements; writing to a view changes the optimiser.
    """

    parameter: nn.Parameter
    start: int
    numel: int
    states: dict[str, Tensor]


class ZeroState:
    """Access to the optimiser state of a DeepSpeed engine, and the moving average kept beside it.

    Args:
        engine: what `deepspeed.initialize` returned.
        parameters: of the model, with what DeepSpeed hangs on them.
        states: what the optimiser's family keeps of each (see `OptimizerFamily`); they are made here, with `step`, a
            count that belongs to the optimiser: torch's make theirs at the first step, too late to load into.
        ema_decay: decay of the moving average of the masters, at first a lower one (see `ema_decay`); 0 keeps none.
        divided: data-parallel ranks have different fragments; otherwise all have the same ones.
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
        """Return the states of every fragment."""
        return ("master", *self._states, *(("ema",) if self._ema else ()))

    def fragments(self) -> Iterator[Fragment]:
        """Yield this rank's fragments; parameters of which ZeRO gave it nothing are left out."""
        for parameter, start, flat, own_start, numel in self._places():
            master = self._masters[flat]
            kept = self._engine.basic_optimizer.state[master]
            flats = {"master": master.detach()} | {name: kept[name] for name in self._states}
            if self._ema:
                flats["ema"] = self._ema[flat]
            states = {name: values.narrow(0, own_start, numel) for name, values in flats.items()}
            yield Fragment(parameter, start, numel, states)

    def _places(self) -> Iterator[tuple[nn.Parameter, int, int, int, int]]:
        """Parameter, first element in it, number of the flat partition, first element in that, elements."""
        if not self._divides_weights:
            for parameter in self._parameters:
                mapping = parameter._hp_mapping
                if mapping is not None:
                    within, own = mapping.lp_fragment_address, mapping.hp_fragment_address
                    yield parameter, within.start, mapping.param_group_index, own.start, own.numel
            return
        flats = {master.untyped_storage()._cdata: flat for flat, master in enumerate(self._masters)}
        for parameter in self._parameters:
            view = _local_master(parameter)
            start = int(parameter.partition_numel()) * dist.get_rank(parameter.ds_process_group)
            # The last rank's partition is padded.
            numel = min(view.numel(), int(parameter.ds_numel) - start)
            if numel > 0:
                flat = flats[view.untyped_storage()._cdata]
                own_start = int(view.storage_offset()) - int(self._masters[flat].storage_offset())
                yield parameter, start, flat, own_start, numel

    def loaded(self, step: int) -> None:
        """Take over states that were written into the fragments' views: set the step and recast the model's weights."""
        self.step = step
        # torch's optimisers count in their states, apex's in its parameter groups.
        for flat in self._masters:
            self._engine.basic_optimizer.state[flat]["step"].fill_(step)
        for group in self._engine.basic_optimizer.param_groups:
            group["step"] = step
        self._recast()

    @torch.no_grad()
    def stepped(self) -> None:
        """Count an update that was applied, and move the average towards the masters."""
        self.step += 1
        if not self._ema:
            return
        share = 1.0 - ema_decay(self._ema_decay, self.step)
        for average, master in zip(self._ema, self._masters, strict=True):
            average.lerp_(master, share)

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """Let the model's weights be the moving average inside, and bitwise what they were afterwards."""
        if not self._ema:
            yield
            return
        kept = [master.detach().clone() for master in self._masters]
        self._set_masters(self._ema)
        yield
        # Not after an exception on one rank: recasting is collective, and the others are somewhere else.
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
        # A forward leaves weights whole, which the next one would take as they are; small ones are whole always.
        optimizer._partition_all_parameters()
        whole = optimizer.persistent_parameters
        if whole:
            whole[0].partition(whole)
        for parameter in self._parameters:
            parameter.ds_tensor.data.copy_(_local_master(parameter))
        if whole:
            whole[0].all_gather(whole)


class FlatZero:
    """ZeRO 1 or 2 of a DeepSpeed engine, which is told sums of gradients and leaves the gathering of weights to others.

    Its own reduction would pass gradients through a bucket in the model's precision after the last micro-batch, and its
    own gathering would wait for all weights before the next one.
    """

    def __init__(self, engine: Any) -> None:
        self._optimizer = engine.optimizer
        # What they would do when a gradient is there takes time and sends it.
        for hook in self._optimizer._grad_acc_hooks:
            hook.remove()

    def groups(self, ranks: dist.ProcessGroup, ranks_of_spread: dist.ProcessGroup) -> list[FlatGroup]:
        """Return the groups of parameters as ZeRO keeps them.

        ranks: those that have the same weights; ranks_of_spread: the same of those that are spread over
            expert-parallel ranks.
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
        """Let the next step use `sums`, reduced, of the parameters of each group."""
        optimizer = self._optimizer
        for number, (group, flat) in enumerate(zip(groups, sums, strict=True)):
            first = group.share * dist.get_rank(group=optimizer.real_dp_process_group[number])
            mine = [
                flat[max(start, first) : min(start + parameter.numel(), first + group.share)]
                for parameter, start in group.parameters
                if start < first + group.share and start + parameter.numel() > first
            ]
            assert len(mine) == len(optimizer.params_in_partition[number])
            optimizer.averaged_gradients[number] = _Partition(mine, flat[first : first + group.share])

    def sum_norm_over(self, groups: Sequence[FlatGroup], everyone: Sequence[dist.ProcessGroup]) -> None:
        """Let the global gradient norm be taken over all ranks of `everyone`, one group after the other, where the
        states are not divided.

        DeepSpeed, which then takes every rank for one without others, would leave out what other ranks alone have.
        """
        optimizer = self._optimizer

        def norm() -> Tensor:
            total = torch.zeros((), dtype=torch.float64, device=groups[0].weights.device)
            for number, group in enumerate(groups):
                mine = zip(optimizer.averaged_gradients[number], optimizer.params_in_partition[number], strict=True)
                for gradient, parameter in mine:
                    if not getattr(parameter, "ds_pipe_replicated", False) and (
                        getattr(parameter, "tensor_model_parallel", False) or optimizer.model_parallel_rank == 0
                    ):
                        total += gradient.double().square().sum() / group.ranks.size()
            for ranks in everyone:
                dist.all_reduce(total, group=ranks)
            return total.sqrt().float()

        optimizer.scaled_global_norm = norm
        # That tells all ranks of what is not finite; DeepSpeed's own check would ask nobody else.
        optimizer.check_overflow = lambda **_: None

    @contextmanager
    def gathering_by(self, gather: Callable[[], None]) -> Iterator[None]:
        """Let `gather` stand in, inside, for the collective that gives every rank the updated weights."""
        from deepspeed.runtime.zero import stage_1_and_2

        own = stage_1_and_2.all_gather_dp_groups
        stage_1_and_2.all_gather_dp_groups = lambda **_: gather()
        try:
            yield
        finally:
            stage_1_and_2.all_gather_dp_groups = own


class _Partition(list):
    """The gradients of a rank's parameters in one group, and all of them in one tensor, as DeepSpeed takes them."""

    def __init__(self, gradients: list[Tensor], flat: Tensor) -> None:
        super().__init__(gradients)
        self.flat_partition = flat


@contextmanager
def spreading_experts(name: str, ranks: dist.ProcessGroup) -> Iterator[None]:
    """Let ZeRO 1 and 2 that are made inside divide the parameter groups called `name` among `ranks`.

    DeepSpeed does so where it finds its own layers of experts. Nor may it give all data-parallel ranks the weights of
    the first: they have them, equal where they are to be.
    """
    from deepspeed.runtime import engine

    own, broadcast = engine.DeepSpeedZeroOptimizer, engine.DeepSpeedEngine._broadcast_model

    def with_experts(*args: Any, **options: Any) -> Any:
        groups = {"expert_parallel_group": {name: ranks}, "expert_data_parallel_group": {name: ranks}}
        return own(*args, **options | groups | {"has_moe_layers": True})

    engine.DeepSpeedZeroOptimizer, engine.DeepSpeedEngine._broadcast_model = with_experts, lambda _: None
    try:
        yield
    finally:
        engine.DeepSpeedZeroOptimizer, engine.DeepSpeedEngine._broadcast_model = own, broadcast


def ema_decay(decay: float, updates: int) -> float:
    """Return the decay of a moving average's update number `updates`, from 1: below `decay` while these are few, so
    that the average soon forgets the weights that training began with.

    min(decay, (1 + n) / (10 + n)), as the official BD3-LM code has it (models/ema.py, from torch_ema).
    """
    return min(decay, (1 + updates) / (10 + updates))


def _local_master(parameter: nn.Parameter) -> Tensor:
    """ZeRO-3: a view of this rank's part of a parameter's fp32 master, padding included."""
    from deepspeed.utils import safe_get_local_fp32_param

    return safe_get_local_fp32_param(parameter)
