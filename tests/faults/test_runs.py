"""Test real runs with faults: killed, stopped, poisoned, out of disk; they continue bitwise, or end with a reason."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.support import forks
from tests.support.programs import BD3_SCALE
from tests.support.recipes import write_recipe
from tests.support.runs import is_alive, losses, newest, rank_pid, records, tensor_files, tensors, wait_for

pytestmark = pytest.mark.alone  # of what hangs, and measures time

STEPS, EVERY = 12, 3
LAYOUTS = {
    "1 process": ["launch.processes=1"],
    "TP2": ["launch.processes=2", "parallel.tensor=2"],
    "PP2": ["launch.processes=2", "parallel.pipeline=2"],
    "DP2, ZeRO-1": ["launch.processes=2", "parallel.zero_stage=1"],
    "DP2, ZeRO-3": ["launch.processes=2", "parallel.zero_stage=3"],
}


class Site:
    """A folder with data, a recipe, and a run of each layout that nobody disturbed."""

    def __init__(self, folder, data):
        self.folder = folder
        shutil.copytree(data, folder / "data")
        write_recipe(
            folder / "recipe.yaml",
            diffusion={"search_interval": True},
            train={"steps": STEPS},
            evaluation={"every_steps": 4, "sequences": 16},
            checkpoint={"every_steps": EVERY, "keep_last": 2},
            guard={"replicas_every_steps": 4},
        )

    def command(self, run, layout, *more):
        return ["train", *more, "recipe.yaml", f"run_dir={run}", *LAYOUTS[layout]]

    def undisturbed(self, layout):
        """Train the undisturbed run of a layout, once."""
        run = self.folder / f"whole {layout}"
        if not run.exists():
            forks.bd3_scale(*self.command(run.name, layout), cwd=self.folder)
        return run


@pytest.fixture(scope="module")
def site(tmp_path_factory, topics):
    return Site(tmp_path_factory.mktemp("faults"), topics)


def run(site, name, layout, *overrides, inject="", code=0):
    more = ["--inject", inject] if inject else []
    done = forks.run([BD3_SCALE, *site.command(name, layout, *more), *overrides], cwd=site.folder)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def differences(run, whole):
    """Return what differs from the undisturbed run, compared bit by bit."""
    found, expected = losses(run), losses(whole)
    files, other = tensor_files(run, STEPS), tensor_files(whole, STEPS)
    assert other
    return [
        *(f"step {step}" for step in expected if found.get(step) != expected[step]),
        *(name for name in other if files.get(name) != other[name]),
    ]


def test_killed_six_times_every_step_is_bitwise_the_undisturbed_one(tmp_path):
    campaign = Path(__file__).parents[2] / "tools" / "fault_campaign.py"
    done = forks.run([sys.executable, campaign, "--kills", 6, "--seed", 3, "--json"], cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert len(found["kills"]) == 6
    assert found["runs"]
    assert all(not run["different"] for run in found["runs"]), found


def test_a_save_that_fails_is_tried_again_and_one_that_keeps_failing_does_not_end_the_run(site):
    inject = "full@save.write:step=3,rank=1"
    inject += "; full@save.begin:step=6; fail@save.write:step=6,rank=1; readonly@save.commit:step=6"
    output = run(site, "full", "DP2, ZeRO-1", inject=inject)
    assert "No space left on device (injected)" in output
    assert "another try follows in 2 s" in output
    assert "step 3: saved full/checkpoints/step-00000003 at try 2" in output
    assert "step 6: NOT SAVED after 3 tries" in output
    assert "Read-only file system (injected)" in output
    saves = {r["step"]: r for r in records(site.folder / "full") if "checkpoint/tries" in r}
    assert {step: (r["checkpoint/tries"], r["checkpoint/failed"]) for step, r in saves.items()} == {
        3: (2, 0),
        6: (3, 1),
        9: (1, 0),
        12: (1, 0),
    }
    assert all(0 <= r["checkpoint/blocked_seconds"] <= r["checkpoint/seconds"] for r in saves.values())
    assert not differences(site.folder / "full", site.undisturbed("DP2, ZeRO-1"))


def test_a_slow_save_is_told_and_the_next_waits_for_it(site):
    slow = ["checkpoint.slow_seconds=0.2", "train.steps=100", "checkpoint.every_steps=60", "evaluation.every_steps=0"]
    slow += ["diffusion.search_interval=false"]
    output = run(site, "slow", "1 process", *slow, inject="delay@save.write:step=60,seconds=3")
    assert len(re.findall(r"step \d+: the last checkpoint is being written since \d s", output)) == 1
    first, last = (r for r in records(site.folder / "slow") if "checkpoint/tries" in r)
    assert (first["step"], last["step"]) == (60, 100)
    assert first["checkpoint/seconds"] > 3 > first["checkpoint/blocked_seconds"]
    assert [r["step"] for r in records(site.folder / "slow") if "train/loss" in r] == list(range(1, 101))


@pytest.mark.slow
def test_a_last_save_that_keeps_failing_is_an_error(site):
    inject = "; ".join(f"fail@save.{part}:step={STEPS}" for part in ("begin", "commit", "rename"))
    output = run(site, "last", "1 process", inject=inject, code=2)
    assert f"error: the checkpoint of step {STEPS} could not be written to last/checkpoints" in output
    assert "older ones are unchanged" in output
    assert newest(site.folder / "last") == STEPS - 3
    run(site, "last", "1 process")
    assert not differences(site.folder / "last", site.undisturbed("1 process"))


def test_a_byte_that_flipped_on_disk_costs_one_checkpoint(site):
    run(site, "flipped", "1 process", inject=f"flip@save.rename:step={STEPS}")
    verify = [BD3_SCALE, "checkpoint", "verify", "flipped"]
    done = forks.run(verify, cwd=site.folder)
    assert done.returncode == 1
    assert "step-00000009: sound" in done.stdout
    assert "rank-00000.safetensors differs from what was written" in done.stdout
    fast = forks.bd3_scale("checkpoint", "verify", "flipped", "--fast", "--json", cwd=site.folder)
    assert json.loads(fast) == {"step-00000009": None, "step-00000012": None}
    output = run(site, "flipped", "1 process")
    assert "it is renamed to damaged-step-00000012, and an older checkpoint is used" in output
    assert "resumed after step 9" in output
    assert not differences(site.folder / "flipped", site.undisturbed("1 process"))
    listed = forks.bd3_scale("checkpoint", "list", "flipped", "--json", cwd=site.folder)
    assert [(one["step"], one["nelbo"] is not None) for one in json.loads(listed)] == [(9, False), (12, True)]


def test_a_rank_that_stops_is_named_with_the_stacks_of_all(site):
    began = time.monotonic()
    output = run(site, "hung", "TP2", "launch.deadlines.step=12", inject="stop@collective:step=5,rank=1", code=75)
    seconds = time.monotonic() - began
    # What it last told may be a second old.
    assert re.search(r"hang in phase '(start|step)' after \d+ s: lowest step [0-5] at ranks \[(0, )?1\]", output)
    assert "ranks [1] do not run (stopped, or their node is gone)" in output
    assert re.search(r"ranks \[0(, 1)?\] in all_reduce of parallel/\w+\.py:\d+ \w+", output), output
    log = (site.folder / "hung" / "logs" / "rank1.log").read_text()
    assert "_take_steps" in output
    assert "_take_steps" in log
    # By PyTorch's flight recorder, as one of NCCL would be, where no stack names it.
    assert re.search(
        r"rank 0 waits in gloo:all_reduce \d+ of .*, for \d+ s\n\S+ \S+ \[rank 0\] rank 0 ended last gloo:\w+ \d+ of",
        output,
    )
    stopped = time.time() - (site.folder / "hung" / "metrics.jsonl").stat().st_mtime
    assert stopped < 12 + 10, seconds
    run(site, "hung", "TP2")
    assert not differences(site.folder / "hung", site.undisturbed("TP2"))


@pytest.mark.parametrize("layout", ["PP2", "DP2, ZeRO-1", "DP2, ZeRO-3"])
def test_one_rank_s_nan_is_skipped_by_all_and_leaves_every_state_as_it_was(site, layout):
    name = f"nan {layout}"
    every = ["checkpoint.every_steps=1", "checkpoint.keep_last=20", "evaluation.every_steps=0"]
    every += ["diffusion.search_interval=false", "train.steps=6"]
    output = run(site, name, layout, *every, inject="nan@gradient:step=3,rank=1")
    assert "step 3: gradients that are not finite" in output
    states = [tensors(site.folder / name, step) for step in (2, 3, 4)]
    assert states[0] == states[1]
    assert states[1].keys() == states[2].keys()
    assert sum(states[1][key] != states[2][key] for key in states[1]) > len(states[1]) / 2
    manifest = json.loads((site.folder / name / "checkpoints" / "step-00000006" / "manifest.json").read_text())
    assert (manifest["step"], manifest["skipped"]) == (6, 1)
    (event,) = [json.loads(line) for line in (site.folder / name / "events.jsonl").read_text().splitlines()]
    assert (event["step"], event["kind"], len(event["sample_ids"])) == (3, "non_finite", 8)
    if layout != "DP2, ZeRO-3":
        return
    # Of the two counts of steps, a resumed run takes each where it belongs.
    shutil.rmtree(site.folder / name / "checkpoints" / "step-00000006")
    shutil.rmtree(site.folder / name / "checkpoints" / "step-00000005")
    before = losses(site.folder / name)
    assert "resumed after step 4" in run(site, name, layout, *every)
    after = losses(site.folder / name)
    assert [after[step] for step in (5, 6)] == [before[step] for step in (5, 6)]


def test_too_many_steps_of_nan_end_the_run_and_replay_computes_one_again(site):
    inject = "nan@gradient:step=7,rank=1; nan@gradient:step=8,rank=1"
    output = run(site, "nans", "TP2", "guard.skip_steps=1", inject=inject, code=2)
    assert "2 steps in a row had gradients that are not finite, the last one step 8" in output
    assert newest(site.folder / "nans") == 6
    before = {path: path.stat().st_mtime_ns for path in (site.folder / "nans").rglob("*")}

    def replay(*options):
        done = forks.run([BD3_SCALE, "replay", *options], cwd=site.folder)
        if done.returncode:
            return done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1]) | {"said": done.stderr}

    again = replay("nans")
    assert "computing steps 7 to 8 from nans/checkpoints/step-00000006" in again["said"]
    assert (again["step"], again["began"], again["applied"], again["same"]) == (8, 6, True, False)
    assert before == {path: path.stat().st_mtime_ns for path in (site.folder / "nans").rglob("*")}
    events = [json.loads(line) for line in (site.folder / "nans" / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events] == [7, 8]
    assert again["keys"]["sample_ids"] == events[1]["sample_ids"]
    burst = replay("nans", "optimizer.lr=1e38")
    assert (burst["grad_norm"], burst["applied"]) == (None, False)
    site.undisturbed("TP2")
    same = replay("whole TP2", "--step", "11")
    assert (same["began"], same["same"]) == (9, True)
    assert "whole TP2 has no step that stood out (events.jsonl): name one with --step" in replay("whole TP2")


def test_a_signal_to_one_rank_alone_stops_all_at_one_step(site):
    command = [*site.command("asked", "DP2, ZeRO-1"), "train.steps=100000", "evaluation.every_steps=0"]
    command += ["diffusion.search_interval=false"]
    # Only --inject arms a run, not what a shell still exports.
    environment = os.environ | {"BD3_SCALE_FAULTS": "kill@step:step=2"}
    process = forks.Program([BD3_SCALE, *command], cwd=site.folder, env=environment)
    wait_for(lambda: process.poll() is not None or max(losses(site.folder / "asked"), default=0) >= 3)
    os.kill(rank_pid(process.pid, 1), signal.SIGUSR1)
    output = "".join(process.communicate())
    assert process.returncode == 0, output
    last = max(losses(site.folder / "asked"))
    assert f"stopped after step {last} by a signal to another rank" in output
    assert newest(site.folder / "asked") == last


def test_what_a_killed_run_left_in_the_temporary_folder_is_removed_by_the_next(site, tmp_path):
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    offline = ["data.num_workers=1", "logging.wandb.mode=offline"]
    command = [*site.command("left", "1 process"), "train.steps=100000", *offline]
    process = forks.Program([BD3_SCALE, *command], cwd=site.folder, env=environment)
    wait_for(lambda: process.poll() is not None or losses(site.folder / "left"))
    rank = rank_pid(process.pid, 0)
    workers = Path(f"/proc/{rank}/task/{rank}/children").read_text().split()
    assert workers
    os.kill(rank, signal.SIGKILL)
    assert process.wait() == 128 + signal.SIGKILL
    wait_for(lambda: not any(is_alive(int(worker)) for worker in workers))
    left = {path.name for path in tmp_path.rglob("*")}
    assert any(name.endswith("wandb-media") for name in left), left
    assert {"lock", "states"} <= left
    assert all(re.fullmatch(r"bd3_scale-rank-[0-9a-f]{8}(\.lock)?", path.name) for path in tmp_path.iterdir())
    command = [*site.command("next", "1 process"), "train.steps=2", *offline]
    forks.bd3_scale(*command, cwd=site.folder, env=environment)
    assert list(tmp_path.iterdir()) == []


def test_a_loader_worker_that_is_killed_ends_the_run_at_once_and_is_named(site):
    command = [*site.command("worker", "DP2, ZeRO-1"), "train.steps=100000", "data.num_workers=1"]
    process = forks.Program([BD3_SCALE, *command], cwd=site.folder)
    wait_for(lambda: process.poll() is not None or losses(site.folder / "worker"))
    rank = rank_pid(process.pid, 0)
    (worker,) = [
        int(child) for task in Path(f"/proc/{rank}/task").iterdir() for child in (task / "children").read_text().split()
    ]
    os.kill(worker, signal.SIGKILL)
    began = time.monotonic()
    output = "".join(process.communicate())
    assert process.returncode == 1, output
    assert time.monotonic() - began < 20
    assert f"error: the loader worker {worker} was killed by SIGKILL" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("inject", "message"),
    [
        ("kill", "fault 'kill' is not ACTION@POINT"),
        ("kill@moon", "a point among start, step"),
        ("nan@step", "nan works at the point gradient only"),
        ("kill@step:step=x", "'step=x' is none of step=N"),
        ("flip@save.link", "flip at save.commit and save.rename only"),
        ("delay@step:seconds=-1", "'seconds=-1' is none of step=N"),
    ],
)
def test_a_fault_that_makes_no_sense_is_refused(site, inject, message):
    assert message in run(site, "nonsense", "1 process", inject=inject, code=2)
    assert not (site.folder / "nonsense").exists()
