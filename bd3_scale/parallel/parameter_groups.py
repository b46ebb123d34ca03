"""From the recipe's optimizer section to groups of parameters that have one rate and one decay.

ZeRO keeps a flat partition of each group, and DeepSpeed reduces gradient norms over all ranks of a model one group
after the other, having dropped those without parameters: a stage with fewer groups would leave the others waiting.
So every stage of a pipeline has all groups of the model, in one order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bd3_scale.model.build import Chunks
from bd3_scale.model.layout import parameter_layouts
from bd3_scale.parallel.collective import gather_values
from bd3_scale.recipe.schema import OptimizerRecipe, ParameterGroup

# What DeepSpeed calls the groups of parameters that are spread over expert-parallel ranks.
EXPERTS = "experts"


class _Kind(NamedTuple):
    """What the tensors of a group share; groups are in this order, matrices before vectors."""

    is_vector: bool
    lr_scale: float
    weight_decay: float
    is_spread: bool  # over expert-parallel ranks


def parameter_groups(
    chunks: Chunks, optimizer: OptimizerRecipe, stages: dist.ProcessGroup
) -> tuple[list[dict[str, Any]], list[nn.Parameter]]:
    """Return the parameter groups of this stage (collective over `stages`), and parameters that stand in for those of
    other stages: one zero that never has a gradient, of each group that has no tensor here.

    A group has `params` in the model's order, `lr_scale` and `weight_decay`. Tensors of fewer than two dimensions do
    not decay unless the recipe says so.

    Raises:
        ValueError: a pattern of the recipe matches no tensor of any stage.
    """
    layouts = [layout for layout in parameter_layouts(chunks) if layout.is_trained]
    named = [(_name(layout.pieces), cast(nn.Parameter, layout.parameter)) for layout in layouts]
    kinds = {name: _kind(name, parameter, optimizer) for name, parameter in named}
    everywhere = {
        name: _Kind(*kind) for stage in gather_values(_as_json(kinds), stages) for name, kind in stage.items()
    }
    _check_patterns(optimizer.groups, sorted(everywhere))
    groups, stand_ins = [], []
    for kind in sorted(set(everywhere.values())):
        params = [parameter for name, parameter in named if kinds[name] == kind]
        if not params:
            stand_ins.append(nn.Parameter(named[0][1].new_zeros(1)))
            stand_ins[-1].allreduce = not kind.is_spread  # type: ignore[attr-defined]
            params = stand_ins[-1:]
        # The last two are DeepSpeed's: such a group is divided among other ranks, see `zero.spreading_experts`.
        spread = {"moe": True, "name": EXPERTS} if kind.is_spread else {}
        groups.append({"params": params, "lr_scale": kind.lr_scale, "weight_decay": kind.weight_decay, **spread})
    return groups, stand_ins


class Elementwise(torch.optim.Optimizer):
    """A torch optimiser of a family's `update`.

    Whoever makes it also makes the states of each parameter, and `step`, a count of the steps that it has had.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], settings: dict[str, Any], update: Callable[..., None]) -> None:
        super().__init__(groups, settings)
        self._update = update

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state: dict[str, Tensor] = self.state[parameter]
                state["step"] += 1
                self._update(parameter, parameter.grad, state, group)


def _name(pieces: Sequence[Any]) -> str:
    (name,) = {piece.key for piece in pieces}
    return str(name)


def _kind(name: str, parameter: nn.Parameter, optimizer: OptimizerRecipe) -> _Kind:
    """Return what the patterns that match give a tensor, later ones over earlier ones."""
    is_vector, is_spread = parameter.ndim < 2, not getattr(parameter, "allreduce", True)
    found = {"lr_scale": 1.0, "weight_decay": 0.0 if is_vector else optimizer.weight_decay}
    for group in optimizer.groups:
        if fnmatchcase(name, group.match):
            found |= group.settings
    return _Kind(is_vector, **found, is_spread=is_spread)


def _as_json(kinds: dict[str, _Kind]) -> dict[str, list[Any]]:
    return {name: list(kind) for name, kind in kinds.items()}


def _check_patterns(groups: Sequence[ParameterGroup], names: Sequence[str]) -> None:
    idle = [group.match for group in groups if not any(fnmatchcase(name, group.match) for name in names)]
    if idle:
        raise ValueError(
            f"optimizer.groups: no tensor's name matches {' or '.join(map(repr, idle))}; the model has:\n  "
            + "\n  ".join(names)
        )
