"""Define families of optimisers: the states kept for a parameter, and its update in a step.

    @optimizers.register("sign")
    class SignDescent(OptimizerFamily):
        def update(self, weight, gradient, state, settings):
            weight.sub_(gradient.sign(), alpha=settings["lr"])

The states are divided by ZeRO, and saved and loaded on any layout under the names in `states`. ZeRO divides a tensor at
any element, so a family sees ranges of flattened tensors and must update each element by itself. Muon does not fit: it
needs whole matrices, with q, k, v, gate and up apart, and gradients that are clipped already. It would gather them from
`ZeroState.fragments`, by the pieces of `model.layout`, between DeepSpeed's clipping and its update.

Imports no PyTorch: a launcher asks a family whether the recipe fits it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from bd3_scale.recipe.schema import OptimizerRecipe
from bd3_scale.registry import optimizers

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class OptimizerFamily:
    """A family of optimisers; a new one defines `update`, or `build` where torch has the optimiser ready.

    Attributes:
        states: names in checkpoints of the fp32 tensors that are kept for every parameter; they have the parameter's
            shape and are zero at first.
        takes: which of the keys `betas` and `eps` of the recipe's optimizer section the family uses.
        options: the keys of `optimizer.options` that the family uses, with defaults.
    """

    states: ClassVar[tuple[str, ...]] = ()
    takes: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, recipe: OptimizerRecipe) -> None:
        self.recipe = recipe

    @property
    def settings(self) -> dict[str, Any]:
        """Return the learning rate, and the other values of the recipe that the family uses."""
        taken = {key: getattr(self.recipe, key) for key in ("lr", *self.takes)}
        return {**taken, **self.options, **self.recipe.options}

    def problems(self) -> Iterator[str]:
        """Yield a message for each value of the recipe that does not fit the family."""
        family = f"optimizer.family={self.recipe.family}"
        for key in ("betas", "eps"):
            value = getattr(self.recipe, key)
            if key not in self.takes and value != OptimizerRecipe.model_fields[key].default:
                yield f"optimizer.{key}={value} is not used by {family}: leave it out"
        for key, value in self.recipe.options.items():
            if key not in self.options:
                near = difflib.get_close_matches(key, self.options, 1) or [", ".join(self.options) or "none"]
                yield f"optimizer.options.{key} is not an option of {family}: it takes {near[0]}"
                continue
            kind = type(self.options[key])
            if type(value) is not kind and (kind, type(value)) != (float, int):
                yield f"optimizer.options.{key}={value!r} is no {kind.__name__}, as {family} takes"

    def build(self, groups: list[dict[str, Any]], *, on_gpu: bool) -> torch.optim.Optimizer:
        """Return the optimiser of parameter groups; each has `params`, `lr_scale` and `weight_decay`.

        on_gpu: whether the states are in GPU memory and one call a step updates a group.
        """
        from bd3_scale.parallel.parameter_groups import Elementwise

        return Elementwise(groups, self.settings, self.update)

    def update(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], settings: dict[str, Any]) -> None:
        """Update a range of weights and its states, in place.

        weight, gradient and the `states` in `state`: fp32 [N]; state["step"]: fp32 [], number of steps including this
        one; settings: those of the family, with `lr` and `weight_decay` of the parameter group.
        """
        raise NotImplementedError(f"{type(self).__name__} defines neither `update` nor `build`")

    def implementation(self, optimizer: torch.optim.Optimizer) -> str:
        """Return the name of the implementation for people, where there are several."""
        return ""


@optimizers.register("adamw")
class AdamW(OptimizerFamily):
    """AdamW (Loshchilov & Hutter, 2019), by the fastest implementation: NVIDIA apex's on a GPU if installed, else
    torch's.
    """

    states = ("exp_avg", "exp_avg_sq")
    takes = ("betas", "eps")

    def build(self, groups: list[dict[str, Any]], *, on_gpu: bool) -> torch.optim.Optimizer:
        import torch

        from bd3_scale.observe.environment import find_apex

        fused_adam = find_apex() if on_gpu else None
        if fused_adam is not None:
            optimizer: torch.optim.Optimizer = fused_adam(groups, adam_w_mode=True, **self.settings)
            return optimizer
        return torch.optim.AdamW(groups, fused=True, **self.settings)

    def implementation(self, optimizer: torch.optim.Optimizer) -> str:
        return "torch's, fused" if type(optimizer).__module__.startswith("torch.") else "NVIDIA apex's FusedAdam"


@optimizers.register("lion")
class Lion(OptimizerFamily):
    """Lion (Chen et al., NeurIPS 2023, algorithm 2): the sign of an average of momentum and gradient."""

    states = ("exp_avg",)
    takes = ("betas",)

    def update(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], settings: dict[str, Any]) -> None:
        beta1, beta2 = settings["betas"]
        direction = state["exp_avg"].lerp(gradient, 1 - beta1).sign_()
        weight.mul_(1 - settings["lr"] * settings["weight_decay"]).sub_(direction, alpha=settings["lr"])
        state["exp_avg"].lerp_(gradient, 1 - beta2)
