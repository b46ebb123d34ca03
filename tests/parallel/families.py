"""Register families of optimisers that the package does not have, as a plug-in does."""

from __future__ import annotations

from typing import ClassVar

import torch

from bd3_scale.parallel.optimizer import OptimizerFamily
from bd3_scale.registry import optimizers


@optimizers.register("bold-momentum")
class BoldMomentum(OptimizerFamily):
    """Momentum without bias correction, and its largest size: two states, an option, and a count of steps."""

    states = ("momentum", "largest")
    options: ClassVar = {"memory": 0.9}

    def update(self, weight, gradient, state, settings):
        memory = settings["memory"]
        state["momentum"].lerp_(gradient, 1 - memory)
        torch.maximum(state["largest"], state["momentum"].abs(), out=state["largest"])
        size = settings["lr"] / (1 - memory ** int(state["step"]))
        weight.mul_(1 - settings["lr"] * settings["weight_decay"])
        weight.sub_(state["momentum"] / (state["largest"] + 1e-3), alpha=size)


class CountsInGroups(torch.optim.Optimizer):
    """Adam as apex FusedAdam counts: a count in each parameter group from the first step on, and none in the states."""

    def __init__(self, params, **settings):
        super().__init__(params, {"weight_decay": 0.0} | settings)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (low, high), count = group["betas"], group["step"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["exp_avg"].lerp_(parameter.grad, 1 - low)
                state["exp_avg_sq"].mul_(high).addcmul_(parameter.grad, parameter.grad, value=1 - high)
                size = (state["exp_avg_sq"] / (1 - high**count)).sqrt() + group["eps"]
                parameter -= group["lr"] * state["exp_avg"] / (1 - low**count) / size


@optimizers.register("counts-in-groups")
class OfCountsInGroups(OptimizerFamily):
    states = ("exp_avg", "exp_avg_sq")
    takes = ("betas", "eps")

    def build(self, groups, *, on_gpu):
        return CountsInGroups(groups, **self.settings)
