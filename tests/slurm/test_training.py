"""The real trainer under a real SLURM: two nodes, TP2 x DP2, real text; stopped, killed and hung, it stays the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from bd3_scale.launch.records import read_json
from tests.slurm.jobs import BD3_SCALE, PROFILE, STEPS, attempts, logs, losses, write_workplace

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]  # four ranks import for half a minute, five times


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    write_workplace(folder)
    return folder


@pytest.fixture(scope="module")
def whole(cluster, workplace):
    """The run that nothing disturbed."""
    run = submit(cluster, workplace, "whole")
    wait(cluster, run, lambda: attempts(run))
    assert attempts(run)[0]["outcome"] == "done", logs(run)
    return run


def submit(cluster, workplace, name, *overrides, steps=STEPS):
    options = [f"run_dir={name}", f"train.steps={steps}", "--nodes", "2", "--json"]
    if "--profile" not in overrides:
        options += ["--profile", "site.yaml"]
    done = subprocess.run(
        [BD3_SCALE, "submit", "recipe.yaml", *options, *overrides],
        cwd=workplace,
        env=cluster.env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    submitted = json.loads(done.stdout)
    assert Path(submitted["script"]).read_text().startswith("#!/bin/bash\n#SBATCH --job-name=tiny-")
    return Path(submitted["run_dir"])


def wait(cluster, run, condition, seconds=150):
    try:
        cluster.wait(condition, seconds, "the run")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{attempts(run)}\n{logs(run)}") from None


def wait_for_step(cluster, run, attempt):
    """Until the ranks of an attempt have taken a step that no checkpoint holds."""

    def taken():
        state = read_json(run / "slurm/heartbeats/rank0.json")
        running = read_json(run / "slurm/current.json").get("attempt") == attempt
        return running and state.get("phase") == "step" and state["step"] > state["saved"]

    wait(cluster, run, taken)


def done(run):
    final = ("done", "failed", "stopped", "cancelled")
    return any(attempt["outcome"] in final for attempt in attempts(run))


def rank_process(run, rank):
    """The process id of a rank of this run, by its environment."""
    heartbeats = f"BD3_SCALE_HEARTBEATS={(run / 'slurm/heartbeats').resolve()}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if heartbeats in environment and f"RANK={rank}".encode() in environment and b"bd3_scale.train" in command:
            return int(process.name)
    raise AssertionError(f"rank {rank} does not run")


def test_two_nodes_take_the_steps_of_one_process(workplace, whole):
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [BD3_SCALE, "train", "recipe.yaml", "run_dir=alone", "parallel.tensor=1", "train.micro_batch_size=8"]
    subprocess.run(command, cwd=workplace, env=environment, check=True, capture_output=True, timeout=120)
    alone = losses(workplace / "alone")
    there = losses(whole)
    assert alone.keys() == there.keys() == set(range(1, STEPS + 1))
    for step, values in alone.items():
        assert there[step] == pytest.approx(values, rel=1e-5), step
    # Every rank has a log of its own, and the run keeps what was submitted.
    assert sorted(path.name for path in (whole / "logs/attempt-0").iterdir()) == [f"rank{k}.log" for k in range(4)]
    assert json.loads((whole / "slurm/job.json").read_text())["commit"]


def test_nodes_keep_a_part_of_remote_data_and_leave_nothing(cluster, workplace, whole):
    """A folder stands for the object store; each node fetches what it reads into its scratch, bounded, for one job."""
    scratch = workplace / "scratch"
    scratch.mkdir()
    site = workplace / "cached.yaml"
    site.write_text(yaml.safe_dump({**PROFILE, "scratch": str(scratch)}))
    options = [f"data.remote={workplace}/data", "data.path=nowhere", "data.cache_limit=2mb", "--profile", str(site)]
    run = submit(cluster, workplace, "cached", *options)
    seen = set()
    wait(cluster, run, lambda: seen.update(p.parent.name for p in scratch.glob("*/train/*")) or done(run))
    job = json.loads((run / "slurm/submitted.json").read_text())["jobs"][0]
    nodes = attempts(run)[0]["nodes"]
    folders = {path.name for path in scratch.iterdir()}
    assert attempts(run)[0]["outcome"] == "done", logs(run)
    assert seen == {"train"}
    assert folders == set(), f"left of job {job} on {nodes}"
    assert losses(run) == losses(whole)


def test_usr1_kill_and_stop_all_go_on_bitwise(cluster, workplace, whole):
    """One run goes through all three: asked to save, a rank killed in mid-step, a rank stopped until the deadline."""
    run = submit(cluster, workplace, "disturbed")
    # A recipe that changes after submission does not count.
    recipe = workplace / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("lr: 0.001", "lr: 0.5"))
    job = json.loads((run / "slurm/submitted.json").read_text())["jobs"][0]
    wait_for_step(cluster, run, 0)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_for_step(cluster, run, 1)
    os.kill(rank_process(run, 3), signal.SIGKILL)
    wait_for_step(cluster, run, 2)
    os.kill(rank_process(run, 1), signal.SIGSTOP)
    wait(cluster, run, lambda: done(run))

    assert [attempt["outcome"] for attempt in attempts(run)] == ["requeued"] * 3 + ["done"], (
        f"{attempts(run)}\n{logs(run)}"
    )
    first, second, third, _ = attempts(run)
    assert (first["failure"], first["saved"]) == (False, first["step"])
    assert second["failure"]
    assert second["reason"].startswith("rank 3: ")
    assert "Killed" in second["reason"]
    assert third["failure"]
    assert third["reason"].startswith("hang in phase")
    assert "ranks [1] do not run" in third["reason"]
    dumped = [(run / f"logs/attempt-2/rank{rank}.log").read_text() for rank in range(4)]
    assert all("most recent call first" in text for text in dumped)
    assert losses(run) == losses(whole)
    assert "recipe.yaml changed after it was submitted" in (run / "logs" / f"job-{job}.log").read_text()
