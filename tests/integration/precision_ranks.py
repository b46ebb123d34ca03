"""Check on one rank of a bf16 training the sum of its micro-batches' gradients, and the optimiser's update."""

from __future__ import annotations

import torch

from bd3_scale.parallel.engine import TrainingEngine
from bd3_scale.parallel.groups import process_groups
from bd3_scale.parallel.schedule import forward_backward
from tests.integration import cases
from tests.integration.parity_ranks import micro_batches


def gradients(engine, micros, groups) -> list[torch.Tensor | None]:
    """Return the gradient of each weight, before ranks exchange them."""
    with engine._engine.coalesce_grad_reduction():
        forward_backward(engine.chunks, micros, groups, 1e-2)
        return [None if p.grad is None else p.grad.clone() for chunk in engine.chunks for p in chunk.parameters()]


def bf16_accumulates_in_fp32(parallel: dict) -> None:
    layout = cases.Layout(2, "ragged", parallel)
    recipe = cases.recipe(layout)
    with process_groups(recipe.parallel) as groups:
        chunks = cases.build(recipe, groups, torch.bfloat16)
        engine = TrainingEngine(chunks, groups, recipe.optimizer, recipe.parallel)
        micros = micro_batches(cases.CASES["ragged"], 0, groups)
        together = gradients(engine, micros, groups)
        alone = [gradients(engine, [micro], groups) for micro in micros]
        for found, *parts in zip(together, *alone, strict=True):
            assert found.dtype == torch.float32
            expected = torch.stack([part.double() for part in parts]).sum(0)
            assert (found - expected).norm() <= 1e-6 * expected.norm(), "micro-batches add up in a short type"
        losses = [engine.step(micros, tokens=cases.BATCH * cases.LENGTH, lr=0.01).loss for _ in range(4)]
        assert losses[-1] < losses[0]
        for fragment in engine.zero.fragments():
            assert {state.dtype for state in fragment.states.values()} == {torch.float32}
            if parallel.get("zero_stage") != 3:
                weights = fragment.parameter.detach().flatten()[fragment.start : fragment.start + fragment.numel]
                assert torch.equal(weights, fragment.states["master"].bfloat16()), "weights are the cast masters"
                # The second half of the head pads the vocabulary, and is zero.
                more = not torch.equal(weights.float(), fragment.states["master"]) or not weights.any()
                assert more, "masters know more than bf16"
