"""The optimiser state that ZeRO divides: fp32 masters, Adam's moments and the moving average, as fragments of
parameters.

The only place that knows DeepSpeed's private names (0.19.8, ZeRO 1 and 2). ZeRO keeps, for each parameter group, one
flat fp32 partition a rank; a parameter's fragment is the stretch of the partition that belongs to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Fragment:
    """A rank's share of one parameter: `numel` elements from `start` of the flattened parameter.

    `states` maps master, exp_avg, exp_avg_sq and, where kept, ema to 1-D fp32 views of that many elements; writing to
    a view changes the optimiser.
    """

    parameter: nn.Parameter
    start: int
    numel: int
    states: dict[str, Tensor]


class ZeroState:
    """Access to the optimiser state of a DeepSpeed engine, and the moving average kept beside it.

    Args:
        engine: what `deepspeed.initialize` returned.
        ema_decay: decay a step of the moving average of the masters; 0 keeps none.
    """

    def __init__(self, engine: Any, ema_decay: float) -> None:
        assert int(engine.zero_optimization_stage()) in (1, 2)
        assert not engine.zero_round_robin_gradients(), "round-robin gradients make DeepSpeed's fragment map wrong"
        self._engine = engine
        self._ema_decay = ema_decay
        self._ema = [flat.detach().clone() for flat in self._masters] if ema_decay else []
        # torch's AdamW creates its state at the first step, after which it could not be loaded in place.
        for flat in self._masters:
            state = engine.basic_optimizer.state[flat]
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat), torch.zeros_like(flat)

    @property
    def _masters(self) -> list[Tensor]:
        masters: list[Tensor] = self._engine.optimizer.single_partition_of_fp32_groups
        return masters

    @property
    def names(self) -> tuple[str, ...]:
        """The states of every fragment."""
        return ("master", "exp_avg", "exp_avg_sq", *(("ema",) if self._ema else ()))

    @property
    def step(self) -> int:
        """Optimiser steps applied."""
        steps = {int(self._engine.basic_optimizer.state[flat]["step"]) for flat in self._masters}
        assert len(steps) == 1, steps
        return steps.pop()

    def fragments(self) -> Iterator[Fragment]:
        """This rank's fragments; parameters of which ZeRO gave it nothing are left out."""
        for parameter in self._engine.module.parameters():
            mapping = parameter._hp_mapping
            if mapping is None:
                continue
            group = mapping.param_group_index
            within, own = mapping.lp_fragment_address, mapping.hp_fragment_address
            state = self._engine.basic_optimizer.state[self._masters[group]]
            flats = {
                "master": self._masters[group].detach(),
                "exp_avg": state["exp_avg"],
                "exp_avg_sq": state["exp_avg_sq"],
            }
            if self._ema:
                flats["ema"] = self._ema[group]
            states = {name: flat.narrow(0, own.start, own.numel) for name, flat in flats.items()}
            yield Fragment(parameter, within.start, within.numel, states)

    def loaded(self, step: int) -> None:
        """Take over states that were written into the fragments' views: set the step and recast the model's weights."""
        for flat in self._masters:
            self._engine.basic_optimizer.state[flat]["step"].fill_(step)
        self._recast()

    @torch.no_grad()
    def update_ema(self) -> None:
        """Move the average towards the masters; call it after a step that was applied."""
        for average, master in zip(self._ema, self._masters, strict=False):
            average.lerp_(master, 1.0 - self._ema_decay)

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """The model's weights are the moving average inside, and bitwise what they were afterwards."""
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
        self._engine.optimizer.update_lp_params()
