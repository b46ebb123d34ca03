"""AdamW by the quickest implementation that this machine has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from bd3_scale.observe.environment import find_apex
from bd3_scale.recipe.schema import OptimizerRecipe


def adamw(parameters: Iterable[nn.Parameter], optimizer: OptimizerRecipe, *, on_gpu: bool) -> torch.optim.Optimizer:
    """AdamW whose weight decay leaves norms and biases alone: NVIDIA apex's on a GPU where it is built, else torch's.

    on_gpu: the optimiser's states are in GPU memory and updated by one call a step; else apex's kernels do not suit.
    """
    parameters = list(parameters)
    decay = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": optimizer.weight_decay}
    no_decay = {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}
    settings: dict[str, Any] = {"lr": optimizer.lr, "betas": optimizer.betas, "eps": optimizer.eps}
    fused_adam = find_apex() if on_gpu else None
    if fused_adam is not None:
        return fused_adam([decay, no_decay], adam_w_mode=True, **settings)
    return torch.optim.AdamW([decay, no_decay], fused=True, **settings)


def describe(optimizer: torch.optim.Optimizer) -> str:
    """Whose AdamW it is, for people."""
    return "torch's fused AdamW" if isinstance(optimizer, torch.optim.AdamW) else "NVIDIA apex's FusedAdam"
