"""Check that a step's inputs, made during the step before, equal those that the step would have made itself."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import pytest

from bd3_scale.objective import BlockDiffusion, StepKeys
from bd3_scale.parallel.engine import StepResult, TrainingEngine
from bd3_scale.recipe.load import load_recipe
from bd3_scale.recipe.schema import Recipe
from bd3_scale.resilience.heartbeat import Heartbeat
from bd3_scale.train.inputs import InputsAhead, step_inputs
from bd3_scale.train.setup import Training, open_run, open_training
from bd3_scale.train.step import take_step, train_on
from tests.support.forks import run_ranks
from tests.support.recipes import write_recipe

STEPS = 4
FOUND = {8: (0.9, 0.95)}
# After the second step, this layout finds another interval.
FOUND_AFTER = 2


def test_inputs_are_made_early_and_are_those_of_their_step(tmp_path: Path, topics: Path) -> None:
    shutil.copytree(topics, tmp_path / "data")
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        data={"path": str(tmp_path / "data")},
        train={"steps": STEPS},
        diffusion={"mask_noise_std": 0.5, "mask_noise_steps": 3},
        run_dir=str(tmp_path / "run"),
    )
    run_ranks(compare, 1, recipe, logs=tmp_path / "logs")


def compare(path: Path) -> None:
    recipe = load_recipe(path)
    with ExitStack() as stack:
        run = open_run(recipe, stack, Heartbeat())
        expected = one_after_the_other(open_training(run, None), recipe)
        events: list[tuple[str, int]] = []
        found = with_inputs_ahead(open_training(run, None), events)
    assert found == expected
    micro_batches = recipe.train.global_batch_size // recipe.train.micro_batch_size
    made = {step: [("inputs", step)] * micro_batches for step in range(1, STEPS + 1)}
    assert events == [
        *made[1],
        *(("gradients", 1), *made[2], ("update", 1)),
        # These inputs were thrown away: an evaluation found another interval.
        *(("gradients", 2), *made[3], ("update", 2)),
        *made[3],
        *(("gradients", 3), *made[4], ("update", 3)),
        *(("gradients", 4), ("update", 4)),
    ]


def one_after_the_other(training: Training, recipe: Recipe) -> list[StepResult]:
    """Train with each step's inputs made when the step begins."""
    run, results = training.run, []
    for step, batch in enumerate(islice(training.stream, STEPS), 1):
        keys = StepKeys(step - 1, recipe.seed, recipe.train.global_batch_size, FOUND if step > FOUND_AFTER else {})
        inputs = step_inputs(run.objective, recipe, batch, run.groups, keys=keys)
        results.append(train_on(training.engine, recipe, inputs, step=step, tokens=batch.tokens.numel()))
    return results


def with_inputs_ahead(training: Training, events: list[tuple[str, int]]) -> list[StepResult]:
    make, gradients, update = BlockDiffusion.training_inputs, TrainingEngine.gradients, TrainingEngine.update

    def noted_inputs(objective, micro, keys, place):
        events.append(("inputs", keys.step + 1))
        assert keys.intervals == ({} if training.state.step < FOUND_AFTER else FOUND)
        return make(objective, micro, keys, place)

    def noted_gradients(*args, **kwargs):
        events.append(("gradients", training.state.step + 1))
        return gradients(*args, **kwargs)

    def noted_update(*args):
        events.append(("update", training.state.step + 1))
        return update(*args)

    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockDiffusion, "training_inputs", noted_inputs)
        patch.setattr(TrainingEngine, "gradients", noted_gradients)
        patch.setattr(TrainingEngine, "update", noted_update)
        while training.state.step < STEPS:
            results.append(take_step(training))
            training.state.finish_step(results[-1])
            if training.state.step == FOUND_AFTER:
                training.state.intervals = FOUND
    damaged_later(training)
    return results


def damaged_later(training: Training) -> None:
    """Check that a batch that cannot be read ends the step that needs it, not the one before."""

    def batches():
        yield next(training.stream)
        raise ValueError("damaged")

    run = training.run
    training.state.step = 0
    inputs = InputsAhead(run.objective, run.recipe, batches(), run.groups, training.state)
    assert len(inputs.take()) == 4
    inputs.make_ahead()
    with pytest.raises(ValueError, match="damaged"):
        inputs.take()
