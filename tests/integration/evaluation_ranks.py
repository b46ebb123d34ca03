"""Train on one rank with and without evaluations in between, which use the averaged weights."""

from __future__ import annotations

import torch

from bd3_scale.model.layout import parameter_layouts
from bd3_scale.parallel.engine import TrainingEngine
from bd3_scale.parallel.groups import process_groups
from bd3_scale.parallel.schedule import token_losses
from tests.integration import cases
from tests.integration.parity_ranks import full_states, micro_batches


def train(layout: cases.Layout, groups, *, evaluate: bool) -> tuple[list, dict]:
    recipe, case = cases.recipe(layout), cases.CASES[layout.case]
    chunks = cases.build(recipe, groups)
    layouts = parameter_layouts(chunks)
    engine = TrainingEngine(chunks, groups, recipe.optimizer, recipe.parallel)
    results, averaged = [], []
    for step in range(4):
        micros = micro_batches(case, step, groups)
        results.append(engine.step(micros, tokens=cases.BATCH * cases.LENGTH, lr=0.01))
        if evaluate:
            with engine.zero.evaluation_weights():
                averaged += [nll.sum() for nll in token_losses(chunks, micros, groups)]
            current = [nll.sum() for nll in token_losses(chunks, micros, groups)]
            assert not averaged or averaged[-len(current) :] != current, "the average is another model"
    return results, full_states(engine, layouts)


def evaluation_leaves_training_alone(layout: cases.Layout) -> None:
    with process_groups(cases.recipe(layout).parallel) as groups:
        results, states = train(layout, groups, evaluate=False)
        again, states_again = train(layout, groups, evaluate=True)
        assert again == results
        assert all(torch.equal(states_again[key], states[key]) for key in states)
