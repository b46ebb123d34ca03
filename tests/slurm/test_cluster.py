"""Test refusals of a site, invented GPUs, and nodes that lose their network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml

from tests.slurm.jobs import PROFILE, attempts, logs, small_job, write_workplace
from tests.support.programs import BD3_SCALE

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, topics):
    folder = tmp_path_factory.mktemp("refused")
    write_workplace(folder, topics)
    return folder


def submit(cluster, workplace, *options, **profile):
    site = workplace / "changed.yaml"
    site.write_text(yaml.safe_dump({**PROFILE, **profile}))
    command = [BD3_SCALE, "submit", "recipe.yaml", "run_dir=refused", "--profile", site, *options]
    return subprocess.run(
        command, cwd=workplace, env=cluster.env, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("options", "profile", "words"),
    [
        (("--nodes", "2"), {"partition": "nowhere"}, ("invalid partition", "partitions here: main high")),
        (("--nodes", "40"), {}, ("SLURM refuses the job",)),
        (("--nodes", "2"), {"memory": "900G"}, ("SLURM refuses the job",)),
        (("--nodes", "2"), {"gpus_per_node": 64}, ("SLURM refuses the job",)),
        (("--nodes", "2", "parallel.tensor=8"), {}, ("2 nodes x 2 processes = 4 ranks", "these would fit: ")),
    ],
)
def test_what_can_never_run_is_refused_at_once(cluster, workplace, options, profile, words):
    recipe = ("train.global_batch_size=640",) if "40" in options else ()
    refused = submit(cluster, workplace, *options, *recipe, **profile)
    assert refused.returncode == 2, refused.stdout
    for word in words:
        assert word in " ".join(refused.stderr.split())
    assert not (workplace / "refused").exists()
    assert cluster.run("squeue", "--noheader").stdout.count("refused") == 0


def test_a_chain_that_is_refused_half_way_leaves_no_job_and_no_folder(cluster, workplace):
    """Check a failure that only the submission meets, a limit on jobs: an sbatch that takes only one job."""
    fake = workplace / "bin/sbatch"
    fake.parent.mkdir()
    real, taken = shutil.which("sbatch"), workplace / "taken"
    fake.write_text(
        f'#!/bin/bash\n[[ "$*" == *--test-only* ]] || mkdir {taken} || {{ echo "no more jobs" >&2; exit 1; }}\n'
        f'exec {real} "$@"\n'
    )
    fake.chmod(0o755)
    (workplace / "kept/logs").mkdir(parents=True)
    options = ["recipe.yaml", "--profile", "site.yaml", "--nodes", "2", "--chain", "2"]
    for run, kept in (("new/refused", ["."]), ("kept", [".", "logs"])):
        refused = subprocess.run(
            [BD3_SCALE, "submit", *options, f"run_dir={run}"],
            cwd=workplace,
            env=cluster.env | {"PATH": f"{fake.parent}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert refused.returncode == 2
        assert "no more jobs" in refused.stderr
        folder = workplace / run.partition("/")[0]
        assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) == kept[1:]
        assert folder.exists() == (run == "kept")
        assert cluster.run("squeue", "--noheader", "--format=%i").stdout == ""
        taken.rmdir()


def test_slurm_says_when_it_would_start(cluster, workplace):
    asked = submit(cluster, workplace, "--nodes", "2", "--test-only")
    assert asked.returncode == 0, asked.stderr
    assert "to start at" in asked.stdout


def test_gpu_directives_are_accepted_and_ranks_see_the_node_s_gpus(cluster, workplace):
    job = small_job(workplace, "gpus", 1, 0.1, gpus_per_node=2, processes_per_node=2)
    told = json.loads((job.folder / "job.json").read_text())
    show = (
        "import os; e = os.environ; print('sees', e['RANK'], e['LOCAL_RANK'], e['CUDA_VISIBLE_DEVICES']); "
        "told = open(e['BD3_SCALE_HEARTBEATS'] + '/rank' + e['RANK'] + '.json', 'w'); "
        """told.write('{"phase": "done", "step": 0, "saved": 0, "beat": 1}')"""
    )
    told["command"] = [sys.executable, "-c", show]
    (job.folder / "job.json").write_text(json.dumps(told))
    submitted = cluster.run("sbatch", "--parsable", job.folder / "job.sh")
    assert submitted.returncode == 0, submitted.stderr
    logs_of_ranks = [job.run_dir / f"logs/attempt-0/rank{rank}.log" for rank in range(4)]
    cluster.wait(lambda: all(path.exists() and path.read_text() for path in logs_of_ranks), 30, "four ranks")
    assert [path.read_text().split() for path in logs_of_ranks] == [
        ["sees", str(rank), str(rank % 2), "0,1"] for rank in range(4)
    ]
    cluster.wait(lambda: attempts(job.run_dir), 30, "the end")
    assert [attempt["outcome"] for attempt in attempts(job.run_dir)] == ["done"], logs(job.run_dir)


@pytest.mark.parametrize("lost", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_node_that_is_cut_off_loses_the_job_and_not_the_run(namespaced, workplace, lost):
    """Each node has a network of its own; the run goes on without the node whose cable was pulled. The first has the
    batch process, which can no longer say anything."""
    job = small_job(workplace, f"cut-{lost}", 220, 0.2, interface="eth0")
    submitted = namespaced.run("sbatch", "--parsable", job.folder / "job.sh")
    assert submitted.returncode == 0, submitted.stderr
    heartbeat = job.folder / "heartbeats/rank1.json"
    namespaced.wait(lambda: heartbeat.exists() and json.loads(heartbeat.read_text())["step"] >= 6, 40, "step 6")
    nodes = json.loads((job.folder / "current.json").read_text())["nodes"]
    namespaced.dev("cut", nodes[lost].lstrip("n"))
    try:
        namespaced.wait(
            lambda: attempts(job.run_dir) and attempts(job.run_dir)[-1]["outcome"] in ("done", "failed", "cancelled"),
            120,
            f"the end; {attempts(job.run_dir)}",
        )
    except AssertionError as error:
        raise AssertionError(f"{error}\n{logs(job.run_dir)}") from None
    assert attempts(job.run_dir)[-1]["outcome"] == "done", logs(job.run_dir)
    assert nodes[lost] not in attempts(job.run_dir)[-1]["nodes"]
    assert 0 < attempts(job.run_dir)[-1]["from_step"] < 220
    if lost == 0:
        said = f"the batch process ended without a record: its node {nodes[0]} is down"
        assert attempts(job.run_dir)[0]["reason"].startswith(said)
