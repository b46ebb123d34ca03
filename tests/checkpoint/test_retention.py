"""Check which checkpoints are deleted, by rules over steps and results, and that the newest complete one never is."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bd3_scale.checkpoint.verify import surplus
from bd3_scale.recipe.schema import CheckpointRecipe
from tests.faults.saving import save


@pytest.fixture(scope="module")
def run(tmp_path_factory, groups):
    """Make a run with checkpoints of steps 1 to 8, of which 2 and 5 have the best evaluations."""
    folder = tmp_path_factory.mktemp("run")
    made = {}
    for step in range(1, 9):
        aside = folder / f"made {step}" / "checkpoints"
        aside.mkdir(parents=True)
        made[step] = save(aside, step)
    nelbos = {1: 3.0, 2: 1.0, 4: 2.0, 5: 1.5, 7: 1.6}
    lines = [{"step": step, "eval/nelbo": nelbo} for step, nelbo in nelbos.items()] + [{"step": 8, "train/loss": 1.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder, made


def kept(run, **recipe):
    folder, made = run
    gone = surplus(made, CheckpointRecipe(**recipe), folder)
    return [step for step in made if made[step] not in gone]


def test_the_rules_add_up(run):
    assert kept(run, keep_last=2) == [7, 8]
    assert kept(run, keep_last=1, keep_every_steps=3) == [3, 6, 8]
    assert kept(run, keep_last=1, keep_best=2) == [2, 5, 8]
    assert kept(run, keep_last=3, keep_every_steps=4, keep_best=1) == [2, 4, 6, 7, 8]
    assert kept(run, keep_last=100) == list(range(1, 9))
    assert kept((run[0] / "nowhere", run[1]), keep_last=1, keep_best=5) == [8]


def test_a_replay_of_the_last_step_that_stood_out_has_its_checkpoint(run):
    events = run[0] / "events.jsonl"
    for step, expected in ((1, [8]), (5, [4, 8]), (8, [7, 8]), (30, [8])):
        events.write_text("".join(json.dumps({"step": at, "kind": "loss_spike"}) + "\n" for at in (2, step)))
        assert kept(run, keep_last=1) == expected
    events.unlink()


def test_a_newest_one_that_is_damaged_keeps_the_one_before(run):
    index = run[1][8] / "index.json"
    whole = index.read_bytes()
    index.write_bytes(whole[:-1])
    assert kept(run, keep_last=1) == [7, 8]
    index.write_bytes(whole)


@given(
    steps=st.sets(st.integers(1, 8), min_size=1),
    last=st.integers(1, 9),
    every=st.integers(0, 4),
    best=st.integers(0, 3),
)
def test_more_rules_never_keep_less(run, steps, last, every, best):
    folder, made = run
    some = {step: made[step] for step in steps}
    less = surplus(some, CheckpointRecipe(keep_last=last), folder)
    more = surplus(some, CheckpointRecipe(keep_last=last, keep_every_steps=every, keep_best=best), folder)
    assert set(more) <= set(less)
    assert some[max(steps)] not in less
    assert len(less) == max(0, len(steps) - last)
