"""Check the counts of the training loop, and which of them a new or resumed run takes over."""

from __future__ import annotations

from pathlib import Path

from bd3_scale.checkpoint.manifest import CheckpointManifest
from bd3_scale.data.order import DataOrder
from bd3_scale.parallel.engine import StepResult
from bd3_scale.train.resume import Start
from bd3_scale.train.state import TrainState

KEPT = CheckpointManifest.model_construct(
    step=7,
    skipped=2,
    intervals={4: (0.3, 0.8)},
    attention_tiles={"forward": [64, 64, 4, 2]},
    data_order=DataOrder(version=2, shuffle_window=640),
)


def test_a_run_that_goes_on_takes_all_of_it_and_one_that_begins_with_weights_takes_none() -> None:
    resumed = TrainState.at(Start(Path("step-7"), KEPT, resumes=True))
    assert resumed == TrainState(7, 2, {4: (0.3, 0.8)}, {"forward": [64, 64, 4, 2]}, KEPT.data_order)
    assert (
        TrainState.at(Start(Path("step-7"), KEPT, resumes=False))
        == TrainState.at(None)
        == TrainState(0, 0, {}, {}, None)
    )


def test_a_step_counts_and_one_whose_update_was_left_out_counts_twice() -> None:
    state = TrainState(7, 2)
    for applied in (True, False, True):
        state.finish_step(StepResult(1.0, ((1.0, 1),), 1.0, 0.1, 1.0, applied))
    assert (state.step, state.skipped) == (10, 3)
