"""Test `bd3-scale doctor --cluster`, which examines a node with a job."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess

import pytest
import yaml

from tests.slurm.jobs import PROFILE
from tests.support.programs import BD3_SCALE

pytestmark = pytest.mark.slurm


def doctor(cluster, folder, *options, path="", **profile):
    (folder / "site.yaml").write_text(yaml.safe_dump({**PROFILE, **profile}))
    return subprocess.run(
        [BD3_SCALE, "doctor", "--cluster", folder / "site.yaml", "--json", *options],
        cwd=folder,
        env=cluster.env | {"PATH": f"{path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


def test_a_node_is_examined_and_a_folder_that_it_does_not_share_is_found(cluster, tmp_path):
    runs, data = tmp_path / "runs", tmp_path / "data"
    fake = tmp_path / "bin/srun"
    for folder in (runs, data, fake.parent):
        folder.mkdir()
    # As on a node where another folder is mounted at that place.
    fake.write_text(f'#!/bin/bash\nrm {data}/.bd3-doctor-token\nexec {shutil.which("srun")} "$@"\n')
    fake.chmod(0o755)
    done = doctor(cluster, tmp_path, "--folder", runs, "--folder", data, path=fake.parent)
    assert done.returncode == 1, done.stderr
    assert "examines one node" in done.stderr
    told = json.loads(done.stdout)
    problems = [
        finding for found in (told["here"], told["node"]) for finding in found if finding["verdict"] == "problem"
    ]
    assert [finding["name"] for finding in problems] == [f"{data}: shared"]
    node = {finding["name"]: finding for finding in told["node"]}
    assert "No such file" in node[f"{data}: shared"]["value"]
    assert node[f"{runs}: shared"]["verdict"] == "ok"
    assert abs(float(node["offset"]["value"].split()[0])) < 2
    assert "free_gb" in node["node"]["value"], "what a job's preflight checks"
    here = {finding["name"]: finding for finding in told["here"]}
    assert here["torch"]["value"] == node["torch"]["value"] == told["versions"]["torch"]
    assert here["partition"]["value"] == "main: UP, 4 nodes"
    assert list(runs.iterdir()) == list(data.iterdir()) == []


@pytest.mark.parametrize(
    ("profile", "name", "words"),
    [
        ({"partition": "nowhere"}, "partition", "one of: main high"),
        pytest.param(
            {"gpus_per_node": 64},
            "GPUs of a node (GRES)",
            "set gpus_per_node to what nodes have",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_slurm_cannot_give_is_told_without_a_job(cluster, tmp_path, profile, name, words):
    done = doctor(cluster, tmp_path, **profile)
    assert done.returncode == 1, done.stderr
    told = json.loads(done.stdout)
    (problem,) = (finding for finding in told["here"] if finding["verdict"] == "problem")
    assert problem["name"] == name
    assert words in problem["fix"]
    assert "node" not in told


@pytest.mark.slow
def test_a_job_that_fails_says_why(cluster, tmp_path):
    done = doctor(cluster, tmp_path, modules=["nowhere/1.0"])
    assert done.returncode == 1, done.stderr
    (job,) = json.loads(done.stdout)["node"]
    assert (job["name"], job["verdict"]) == ("job", "problem")
    assert "module" in job["value"]


@pytest.mark.slow
def test_ctrl_c_takes_the_job_back_and_leaves_nothing(cluster, tmp_path):
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(PROFILE))
    folder = tmp_path / "runs"
    folder.mkdir()
    program = subprocess.Popen(
        [BD3_SCALE, "doctor", "--cluster", tmp_path / "site.yaml", "--folder", folder],
        env=cluster.env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        job = re.match(r"job (\d+) examines", program.stderr.readline())[1]
        program.send_signal(signal.SIGINT)
        assert program.wait(30) not in (0, 1)
    finally:
        program.kill()
    cluster.wait(lambda: "CANCELLED" in cluster.run("scontrol", "show", "job", job).stdout, 20, "the end of the job")
    assert list(folder.iterdir()) == []
