"""Test the real trainer under a real SLURM: stopped, killed and hung on two nodes, it computes the same."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from bd3_scale.launch.records import read_json
from tests.slurm.jobs import PROFILE, STEPS, attempts, logs, write_workplace
from tests.support import forks
from tests.support.programs import BD3_SCALE
from tests.support.runs import losses

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
SITES = {"one.yaml": PROFILE | {"processes_per_node": 1}, "two.yaml": PROFILE}  # processes a node


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, topics):
    folder = tmp_path_factory.mktemp("trained")
    write_workplace(folder, topics)
    for name, profile in SITES.items():
        profile = profile | {"deadlines": PROFILE["deadlines"] | {"step": 10}}
        (folder / name).write_text(yaml.safe_dump(profile))
    return folder


@pytest.fixture(scope="module")
def undisturbed(workplace):
    """Return the losses of a run on this machine, without SLURM, in a layout."""

    @functools.cache
    def of(processes, tensor, *more):
        name = f"here {processes} {tensor} {len(more)}"
        layout = [f"launch.processes={processes}", f"parallel.tensor={tensor}", *more]
        forks.bd3_scale("train", "recipe.yaml", f"run_dir={name}", "optimizer.lr=0.001", *layout, cwd=workplace)
        return losses(workplace / name)

    return of


def submit(cluster, workplace, name, *overrides, steps=STEPS, **environment):
    options = [f"run_dir={name}", f"train.steps={steps}", "--nodes", "2", "--json"]
    done = subprocess.run(
        [BD3_SCALE, "submit", "recipe.yaml", *options, *overrides],
        cwd=workplace,
        env=cluster.env | environment,
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
    """Wait until the ranks of an attempt have taken a step that no checkpoint holds."""

    def taken():
        heartbeats = (run / "slurm/heartbeats").resolve()  # those of the attempt before, until its ranks start
        state = read_json(heartbeats / "rank0.json")
        return (
            heartbeats.name == f"heartbeats-{attempt}"
            and state.get("phase") == "step"
            and state["step"] > state["saved"]
        )

    wait(cluster, run, taken)


def done(run):
    final = ("done", "failed", "stopped", "cancelled")
    return any(attempt["outcome"] in final for attempt in attempts(run))


def rank_process(run, rank):
    """Return the process id of a rank of this run, found by its environment."""
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


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_usr1_kill_and_stop_all_go_on_bitwise(cluster, workplace, undisturbed, processes):
    """One run goes through all three: asked to save, a rank killed in mid-step, a rank stopped until the deadline."""
    expected, last = undisturbed(2 * processes, processes), 2 * processes - 1
    site = ["--profile", list(SITES)[processes - 1], f"parallel.tensor={processes}"]
    run = submit(cluster, workplace, f"disturbed 90%u {processes}", "optimizer.lr=0.001", *site)
    # A recipe that changes after submission does not count.
    recipe = workplace / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "# changed\n")
    job = json.loads((run / "slurm/submitted.json").read_text())["jobs"][0]
    wait_for_step(cluster, run, 0)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_for_step(cluster, run, 1)
    os.kill(rank_process(run, last), signal.SIGKILL)
    wait_for_step(cluster, run, 2)
    os.kill(rank_process(run, 1), signal.SIGSTOP)
    wait(cluster, run, lambda: done(run))

    assert [attempt["outcome"] for attempt in attempts(run)] == ["requeued"] * 3 + ["done"], (
        f"{attempts(run)}\n{logs(run)}"
    )
    first, second, third, _ = attempts(run)
    assert (first["failure"], first["saved"]) == (False, first["step"])
    assert second["failure"]
    assert second["reason"].startswith(f"rank {last}: ")
    assert "Killed" in second["reason"]
    assert third["failure"]
    assert third["reason"].startswith("hang in phase")
    assert "ranks [1] do not run" in third["reason"]
    dumped = [(run / f"logs/attempt-2/rank{rank}.log").read_text() for rank in range(2 * processes)]
    assert all("most recent call first" in text for text in dumped)
    assert losses(run) == expected
    assert "recipe.yaml changed after the submission" in (run / "logs" / f"job-{job}.log").read_text()


@pytest.mark.xdist_group("slurm training")  # not both at once: four ranks import for ten seconds
def test_two_nodes_take_the_steps_of_one_process(cluster, workplace, undisturbed):
    """And import what the recipe names as plug-ins, from where the submission found it."""
    lab = workplace / "lab"
    lab.mkdir()
    marks = "import os, pathlib\npathlib.Path(__file__).with_name(os.environ.get('SLURM_PROCID', 'here')).touch()"
    (lab / "marks.py").write_text(marks)
    path = os.pathsep.join([str(lab), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = submit(cluster, workplace, "whole", "--profile", "two.yaml", "plugins=[marks]", PYTHONPATH=path)
    alone = undisturbed(1, 1, "train.micro_batch_size=8")
    wait(cluster, run, lambda: attempts(run))
    assert attempts(run)[0]["outcome"] == "done", logs(run)
    found = losses(run)
    assert alone.keys() == found.keys() == set(range(1, STEPS + 1))
    for step, values in alone.items():
        assert found[step] == pytest.approx(values, rel=1e-5), step
    assert {name for name in os.listdir(lab) if "." not in name} - {"__pycache__"} == {"here", "0", "1", "2", "3"}
    # Every rank has a log of its own, and the run keeps what was submitted.
    assert sorted(path.name for path in (run / "logs/attempt-0").iterdir()) == [f"rank{k}.log" for k in range(4)]
    assert json.loads((run / "slurm/job.json").read_text())["commit"]


@pytest.mark.slow
@pytest.mark.xdist_group("slurm training")
def test_nodes_keep_a_part_of_remote_data_and_leave_nothing(cluster, workplace, undisturbed):
    """A folder stands for the object store; each node fetches what it reads into its scratch, bounded, for one job."""
    scratch = workplace / "scratch"
    scratch.mkdir()
    site = workplace / "cached.yaml"
    site.write_text(yaml.safe_dump({**SITES["one.yaml"], "scratch": str(scratch)}))
    options = [f"data.remote={workplace}/data", "data.path=nowhere", "data.cache_limit=2mb", "parallel.tensor=1"]
    run = submit(cluster, workplace, "cached", *options, "--profile", str(site))
    seen = set()
    wait(cluster, run, lambda: seen.update(p.parent.name for p in scratch.glob("*/train/*")) or done(run))
    job = json.loads((run / "slurm/submitted.json").read_text())["jobs"][0]
    nodes = attempts(run)[0]["nodes"]
    folders = {path.name for path in scratch.iterdir()}
    assert attempts(run)[0]["outcome"] == "done", logs(run)
    assert seen == {"train"}
    assert folders == set(), f"left of job {job} on {nodes}"
    assert losses(run) == undisturbed(2, 1)


@pytest.mark.slow
@pytest.mark.xdist_group("slurm training")
def test_nodes_keep_a_part_of_each_source_and_go_on_after_a_kill(cluster, workplace, undisturbed):
    scratch = workplace / "scratch of sources"
    scratch.mkdir()
    site = workplace / "sources.yaml"
    deadlines = PROFILE["deadlines"] | {"step": 10}
    site.write_text(yaml.safe_dump({**SITES["one.yaml"], "scratch": str(scratch), "deadlines": deadlines}))
    shutil.copytree(workplace / "data", workplace / "other")

    def mixture(**places):
        sources = [{"name": "web", "path": "data", "weight": 0.75}, {"name": "code", "path": "other", "weight": 0.25}]
        sources[1] |= places
        sources[0] |= {"remote": f"{workplace}/data", "path": "nowhere"} if places else {}
        return ["data.path=''", f"data.sources={json.dumps(sources)}"]

    remote = mixture(path="nowhere at all", remote=f"{workplace}/other")
    options = [*remote, "data.cache_limit=2mb", "optimizer.lr=0.001", "parallel.tensor=1"]
    run = submit(cluster, workplace, "sources", *options, "--profile", str(site))
    seen = set()
    wait_for_step(cluster, run, 0)
    seen.update(path.parent.parent.name for path in scratch.glob("*/*/train/*"))
    os.kill(rank_process(run, 1), signal.SIGKILL)
    wait(cluster, run, lambda: done(run))
    assert [attempt["outcome"] for attempt in attempts(run)] == ["requeued", "done"], f"{attempts(run)}\n{logs(run)}"
    assert seen == {"web", "code"}
    assert list(scratch.iterdir()) == []
    assert losses(run) == undisturbed(2, 1, *mixture())
