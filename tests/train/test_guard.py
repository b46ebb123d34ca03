"""Check which steps the guard records, and for which it ends a run."""

from __future__ import annotations

import json
import math

import pytest

from bd3_scale.observe.metrics import EVENTS_FILE, last_event
from bd3_scale.parallel.engine import StepResult
from bd3_scale.recipe.schema import GuardRecipe
from bd3_scale.train.guard import Guard


def result(loss, *, applied=True):
    return StepResult(loss, ((loss, 1),), 1.0 if applied else math.inf, 0.1, 1.0, applied)


def keys():
    return {"seed": 3, "epoch": 1, "sample_ids": [5, 9], "intervals": {8: (0.3, 0.8)}}


@pytest.fixture
def guard(groups, tmp_path):
    def make(step=0, **recipe):
        return Guard(tmp_path, GuardRecipe(**recipe), step=step)

    return make


def events(folder):
    path = folder / EVENTS_FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_loss_stands_out_of_those_before_it_and_a_slow_fall_does_not(guard, tmp_path):
    watch = guard(spike_deviations=8)
    noise = [0.02 * math.sin(37 * step) for step in range(400)]
    for step in range(1, 301):
        assert watch.check(step, result(3 - step / 200 + noise[step]), keys) is None
    told = watch.check(301, result(2.2), keys)
    assert told.startswith("step 301: loss 2.2000 stands out of 1.5")
    assert watch.check(302, result(1.52), keys) is None
    (event,) = events(tmp_path)
    assert (event["step"], event["kind"], event["loss"], event["sample_ids"]) == (301, "loss_spike", "2.2", [5, 9])
    assert event["median"] + 8 * event["deviation"] < 2.2
    assert event["intervals"] == {"8": [0.3, 0.8]}


def test_a_few_losses_tell_nothing_and_0_asks_for_none(guard, tmp_path):
    early, never = guard(), guard(spike_deviations=0)
    for step in range(1, 31):
        assert early.check(step, result(1.0), keys) is None
        assert never.check(step, result(1.0), keys) is None
    assert early.check(31, result(50.0), keys) is None
    for step in range(31, 99):
        never.check(step, result(1.0), keys)
    assert never.check(99, result(50.0), keys) is None
    assert events(tmp_path) == []


def test_steps_in_a_row_count_and_a_good_one_begins_anew(guard, tmp_path):
    watch = guard(skip_steps=2)
    for step in (1, 2):
        assert "its update is left out" in watch.check(step, result(math.nan, applied=False), keys)
    watch.check(3, result(1.0), keys)
    for step in (4, 5):
        watch.check(step, result(math.inf, applied=False), keys)
    with pytest.raises(FloatingPointError, match=r"3 steps in a row .* the last one step 6 with loss nan"):
        watch.check(6, result(math.nan, applied=False), keys)
    assert [event["step"] for event in events(tmp_path)] == [1, 2, 4, 5, 6]
    with pytest.raises(FloatingPointError, match="step 7 has loss nan with finite gradients"):
        watch.check(7, result(math.nan), keys)


def test_a_resumed_run_forgets_what_comes_after_and_remembers_losses(guard, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, "train/loss": 1.0, "train/grad_norm": 1.0}) + "\n" for step in range(1, 41))
    )
    (tmp_path / EVENTS_FILE).write_text('{"step": 30, "kind": "loss_spike"}\n{"step": 45, "kind": "loss_spike"}\n')
    watch = guard(step=40)
    assert [event["step"] for event in events(tmp_path)] == [30]
    assert "stands out" in watch.check(41, result(2.0), keys)


def test_a_resume_that_changes_something_is_recorded_and_is_no_step_that_stood_out(tmp_path, groups):
    guard = Guard(tmp_path, GuardRecipe(), step=3)
    guard.resumed(3, [("optimizer.lr", 0.1, 0.2)], ["optimizer.lr 0.1 → 0.2"])
    (event,) = events(tmp_path)
    assert event == {
        "step": 3,
        "kind": "resumed",
        "changes": {"optimizer.lr": {"before": 0.1, "now": 0.2}},
        "notes": ["optimizer.lr 0.1 → 0.2"],
    }
    assert last_event(tmp_path) is None
