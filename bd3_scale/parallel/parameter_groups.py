"""Divide parameters into groups with one learning rate and one weight decay, by the recipe's optimizer section.

ZeRO keeps a flat partition of each group. DeepSpeed drops groups without parameters and then reduces gradient norms
over all ranks of a model, one group after the other. A pipeline stage with fewer groups would therefore leave the other
stages waiting for ever. So every stage has all groups of the model, in one order.
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

# DeepSpeed's name for the parameter groups that are spread over expert-parallel ranks.
EXPERTS = "experts"


class _Properties(NamedTuple):
    """The properties that the tensors of a group share; groups are sorted by them, matrices before vectors."""

    is_vector: bool
    lr_scale: float
    weight_decay: float
    is_spread: bool  # over expert-parallel ranks


def parameter_groups(
    chunks: Chunks, optimizer: OptimizerRecipe, stages: dist.ProcessGroup
) -> tuple[list[dict[str, Any]], list[nn.Parameter]]:
    """Return the parameter groups of this stage, and placeholder parameters (collective over `stages`).

    A group has `params` in the model's order, `lr_scale` and `weight_decay`. Tensors of fewer than two dimensions do
    not decay unless the recipe says so. A group without a tensor on this stage gets a placeholder: a single zero that
    never has a gradient.

    Raises:
        ValueError: a pattern of the recipe matches no tensor of any stage.
    """
    layouts = [layout for layout in parameter_layouts(chunks) if layout.is_trained]
    named = [(_name(layout.pieces), cast(nn.Parameter, layout.parameter)) for layout in layouts]
    properties = {name: _properties_of(name, parameter, optimizer) for name, parameter in named}
    everywhere = {
        name: _Properties(*each)
        for stage in gather_values(_as_json(properties), stages)
        for name, each in stage.items()
    }
    _check_patterns(optimizer.groups, sorted(everywhere))
    groups, placeholders = [], []
    for each in sorted(set(everywhere.values())):
        params = [parameter for name, parameter in named if properties[name] == each]
        if not params:
            placeholders.append(nn.Parameter(named[0][1].new_zeros(1)))
            placeholders[-1].allreduce = not each.is_spread  # type: ignore[attr-defined]
            params = placeholders[-1:]
        # `moe` and `name` are DeepSpeed's keys of a group that is divided among other ranks, see
        # `zero.spreading_experts`.
        spread = {"moe": True, "name": EXPERTS} if each.is_spread else {}
        groups.append({"params": params, "lr_scale": each.lr_scale, "weight_decay": each.weight_decay, **spread})
    return groups, placeholders


class Elementwise(torch.optim.Optimizer):
    """A torch optimiser that calls a family's `update` for each parameter.

    The caller creates the states of each parameter, and `step`, the number of its steps.
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


def _properties_of(name: str, parameter: nn.Parameter, optimizer: OptimizerRecipe) -> _Properties:
    """Return the properties that the recipe's patterns give a tensor; later patterns override earlier ones."""
    is_vector, is_spread = parameter.ndim < 2, not getattr(parameter, "allreduce", True)
    settings = {"lr_scale": 1.0, "weight_decay": 0.0 if is_vector else optimizer.weight_decay}
    for group in optimizer.groups:
        if fnmatchcase(name, group.match):
            settings |= group.settings
    return _Properties(is_vector, **settings, is_spread=is_spread)


def _as_json(properties: dict[str, _Properties]) -> dict[str, list[Any]]:
    return {name: list(each) for name, each in properties.items()}


def _check_patterns(groups: Sequence[ParameterGroup], names: Sequence[str]) -> None:
    idle = [group.match for group in groups if not any(fnmatchcase(name, group.match) for name in names)]
    if idle:
        raise ValueError(
            f"optimizer.groups: no tensor's name matches {' or '.join(map(repr, idle))}; the model has:\n  "
            + "\n  ".join(names)
        )
