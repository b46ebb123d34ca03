"""Train on ranks that share out experts; one rank has a gradient of its own experts that is not finite."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from bd3_scale.parallel.engine import TrainingEngine
from bd3_scale.parallel.groups import process_groups
from tests.integration import cases
from tests.integration.parity_ranks import expert_bias, micro_batches

CASE = "moe"


def state_of(engine: TrainingEngine) -> list[torch.Tensor]:
    """Return everything that a step may change on this rank."""
    weights = [p.detach().clone() for chunk in engine.chunks for p in chunk.parameters()]
    kept = [state.clone() for fragment in engine.zero.fragments() for state in fragment.states.values()]
    return [*weights, *kept, expert_bias(engine.chunks)]


def skips(ranks: int, parallel: dict, precision: torch.dtype) -> None:
    """Check three steps; in the second, the last rank's gradient of one of its experts is NaN in one place."""
    layout = cases.Layout(ranks, CASE, parallel)
    case, recipe = cases.CASES[CASE], cases.recipe(layout)
    with process_groups(recipe.parallel) as groups:
        engine = TrainingEngine(cases.build(recipe, groups, precision), groups, recipe.optimizer, recipe.parallel)

        def step(number: int):
            micros = micro_batches(case, number, groups)
            return engine.step(micros, tokens=cases.BATCH * cases.LENGTH, lr=0.01)

        assert step(0).applied
        before = state_of(engine)
        with poisoned(engine, on=dist.get_rank() == dist.get_world_size() - 1):
            skipped = step(1)
        assert not skipped.applied
        assert skipped.grad_norm == math.inf
        assert math.isfinite(skipped.loss)
        after = state_of(engine)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "a skipped step changed something"
        assert engine.zero.step == 1
        # No number that is not finite remains.
        following = step(1)
        assert following.applied
        assert following.loss == skipped.loss
        assert math.isfinite(following.grad_norm)
        moved = [torch.equal(a, b) for a, b in zip(after, state_of(engine), strict=True)]
        assert sum(moved) < len(moved) / 2
        assert not moved[-1], "the biases move again"
        assert not any(t.isnan().any() for t in state_of(engine))


class poisoned:
    """A context in which one number of a gradient is NaN, that of an expert in this rank's last layer, if `on`."""

    def __init__(self, engine: TrainingEngine, *, on: bool) -> None:
        experts = engine.chunks[-1].decoder.layers[-1].mlp.experts
        self._weight = experts.linear_fc2.weight if on else None

    def __enter__(self) -> None:
        if self._weight is not None:
            self._handle = self._weight.register_hook(self._poison)

    def _poison(self, gradient: torch.Tensor | None) -> torch.Tensor | None:
        if gradient is None:
            # The weight's function has added the gradient to the sum by itself.
            self._weight.main_grad.view(-1)[5] = math.nan
            return None
        gradient = gradient.clone()
        gradient.view(-1)[5] = math.nan
        return gradient

    def __exit__(self, *_: object) -> None:
        if self._weight is not None:
            self._handle.remove()
