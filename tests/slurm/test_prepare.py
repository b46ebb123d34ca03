"""Test `bd3-scale data prepare --slurm`: an array of shares, with a node and a share killed meanwhile."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from bd3_scale.cli import app
from bd3_scale.data import tasks
from tests.data.documents import random_texts, write_jsonl
from tests.slurm.jobs import PROFILE

pytestmark = pytest.mark.slurm

SHARES = 4
OPTIONS = ["--out", "out", "--tokenizer", "bytes", "--seq-len", "64", "--holdout", "0.2", "--workers", "1"]


@pytest.fixture
def workplace(tmp_path, monkeypatch, cluster):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    monkeypatch.setattr(tasks, "TASK_BYTES", 100_000)
    write_jsonl(tmp_path / "t.jsonl", random_texts(2_000, longest=1_000))
    return tmp_path


def prepare(*options, **profile):
    Path("site.yaml").write_text(yaml.safe_dump({**PROFILE, "environment": {}, **profile}))
    done = CliRunner().invoke(app, ["data", "prepare", "t.jsonl", *OPTIONS, "--json", *options])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return json.loads(done.stdout)


def submit(**profile):
    return prepare("--slurm", "site.yaml", "--tasks", str(SHARES), **profile)["jobs"]


def elements(cluster, jobs):
    """State and node of each job and part of an array that SLURM knows."""
    listed = cluster.run("squeue", "--noheader", "--array", "--states=all", "--format=%i %T %N", f"--jobs={jobs}")
    return {job: rest for job, *rest in map(str.split, listed.stdout.splitlines())}


def ended(cluster, jobs):
    found = [state for job in jobs for state, *_ in elements(cluster, job).values()]
    return found and not {"PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED"} & set(found)


def said():
    return "\n".join(f"== {path}\n{path.read_text()[-1000:]}" for path in Path("out.tasks/logs").glob("*.log"))


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_node_and_a_share_are_killed_and_the_command_repeated(cluster, workplace):
    array, merging = submit(cpus_per_process=2)  # of two processes: all that a node has
    with pytest.raises(ValueError, match=rf"out\.tasks has jobs already: .*{array}"):
        submit()
    running = {}

    def two_run():
        nonlocal running
        running = {job: where[0] for job, (state, *where) in elements(cluster, array).items() if state == "RUNNING"}
        return len(running) >= 2

    cluster.wait(two_run, 60, "two shares to run")
    (lost, node), (cancelled, other) = list(running.items())[:2]
    assert node != other
    cluster.kill_node(node.lstrip("n"))
    cluster.run("scancel", "--signal=KILL", "--full", cancelled)
    try:
        cluster.wait(lambda: ended(cluster, [array, merging]), 180, f"the end\n{said()}")
    finally:
        cluster.start_node(node.lstrip("n"))
    # That of the lost node was taken up elsewhere; the killed one is missing, so that nothing was merged.
    states = {job: state for job, (state, *_) in elements(cluster, array).items()}
    assert states.pop(cancelled) != "COMPLETED"
    assert set(states.values()) == {"COMPLETED"}, (states, said())
    assert lost in states
    assert elements(cluster, merging)[merging][0] == "CANCELLED"
    assert not Path("out").exists()
    jobs = submit(cpus_per_process=2)
    number = int(cancelled.partition("_")[2])
    assert list(elements(cluster, jobs[0])) == [f"{jobs[0]}_{number}"]
    cluster.wait(lambda: ended(cluster, jobs), 120, f"the end\n{said()}")
    assert Path("out/manifest.json").exists(), said()
    assert not Path("out.tasks").exists()
    prepare("--out", "alone")
    assert files_of(Path("out")) == files_of(Path("alone"))


def test_what_slurm_or_the_site_refuses_is_told_and_nothing_is_submitted(cluster, workplace):
    for profile, words in (
        ({"partition": "nowhere"}, "SLURM refuses the job"),
        ({"shared_storage": ["/elsewhere"]}, "is not on shared storage"),
    ):
        with pytest.raises(ValueError, match=words):
            submit(**profile)
        assert not Path("out.tasks").exists()
    assert "prepare-out" not in cluster.run("squeue", "--noheader", "--format=%j").stdout
    assert os.listdir() == ["t.jsonl", "site.yaml"]
