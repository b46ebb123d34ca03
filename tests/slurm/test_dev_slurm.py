"""Test `cluster/dev-slurm`: its nodes, their invented GPUs, nodes that die or lose their network, and `down`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slurm


def living(pids):
    """Return the processes that still run; a zombie has no command line."""
    return [pid for pid in pids if (path := Path(f"/proc/{pid}/cmdline")).exists() and path.read_bytes()]


def steps(cluster):
    """Return the slurmstepd processes of this cluster, whatever their parent is now."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            name, environment = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        except OSError:
            continue
        if name.startswith(b"slurmstepd") and f"SLURM_CONF={cluster.folder}/slurm.conf".encode() in environment:
            found.append(int(process.name))
    return found


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory(prefix="bd3-slurm-") as name:
        yield Path(name)


def test_all_nodes_come_up_and_one_step_runs_on_two(cluster):
    cluster.wait(lambda: all(cluster.state(node) == "idle" for node in range(1, 5)), 20, "four idle nodes")
    ran = cluster.run("srun", "--nodes=2", "--ntasks-per-node=1", "bash", "-c", "echo $SLURMD_NODENAME")
    assert len(set(ran.stdout.split())) == 2, ran.stderr


def test_a_job_is_given_the_invented_gpus(cluster, tmp_path):
    script, log = tmp_path / "job.sh", tmp_path / "log"
    script.write_text("#!/bin/bash\n#SBATCH --gpus-per-node=2\n#SBATCH --nodes=1\necho sees $CUDA_VISIBLE_DEVICES\n")
    done = cluster.run("sbatch", "--wait", f"--output={log}", script)
    assert done.returncode == 0, done.stderr
    assert log.read_text().split() == ["sees", "0,1"]


def test_a_killed_node_is_down_until_it_is_started_again(cluster):
    cluster.kill_node(4)
    cluster.wait(lambda: cluster.state(4).startswith("down"), 25, "n4 to be down")
    assert cluster.state(3) == "idle"
    cluster.start_node(4)
    cluster.wait(lambda: cluster.state(4) == "idle", 20, "n4 to be back")


def test_a_second_start_in_one_folder_is_refused(cluster):
    before = cluster.run("sinfo", "--noheader").stdout
    assert "main" in before
    again = cluster.run(*cluster.command("up"))
    assert again.returncode == 1
    assert "runs in" in again.stderr
    assert cluster.run("sinfo", "--noheader").stdout == before


def test_a_folder_of_something_else_is_not_emptied(cluster, folder):
    (folder / "thesis.txt").write_text("mine")
    refused = cluster.run(*type(cluster)(folder).command("up"))
    assert refused.returncode == 1
    assert "holds something else" in refused.stderr
    assert (folder / "thesis.txt").read_text() == "mine"


def test_a_node_that_does_not_exist_is_named(cluster):
    refused = cluster.run(*cluster.command("kill-node", 9))
    assert refused.returncode == 1
    assert "no node 9: there are 1, 2, 3, 4" in refused.stderr


def test_each_node_has_an_address_and_a_cable(namespaced):
    show = "hostname; ip -4 -o address show eth0"
    ran = namespaced.run("srun", "--nodes=3", "--ntasks-per-node=1", "bash", "-c", show)
    assert {word for word in ran.stdout.split() if word in ("n1", "n2", "n3")} == {"n1", "n2", "n3"}, ran.stderr
    assert len({word for word in ran.stdout.split() if word.endswith("/24")}) == 3
    namespaced.dev("cut", 1)
    namespaced.wait(lambda: namespaced.state(1).startswith("down"), 25, "n1 to be unreachable")
    assert namespaced.state(2) == "idle"
    namespaced.dev("join", 1)
    namespaced.wait(lambda: namespaced.state(1) == "idle", 20, "n1 to be back")


@pytest.mark.parametrize("options", [(), ("--namespaces",)], ids=["shared", "namespaces"])
def test_down_leaves_nothing_of_a_cluster_with_a_lost_node(request, cluster, folder, options):
    """Check it with a step that outlives its slurmd, and one on a node without network, which gets no cancel."""
    if options:
        request.getfixturevalue("as_root")
    own = type(cluster)(folder / "own")
    own.dev("up", "--nodes", "2", *options)
    try:
        submitted = own.run("sbatch", "--nodes=2", "--output=/dev/null", "--wrap", "srun sleep 600")
        assert submitted.returncode == 0, submitted.stderr
        # That of the batch script, and of each node's part of the step.
        own.wait(lambda: len(steps(own)) >= 3, 20, "three processes that hold steps")
        daemons = [int(path.read_text()) for path in (own.folder / "run").glob("*.pid")]
        assert len(daemons) == 4
        pids = [*daemons, *steps(own)]
        assert bool(devices(own)) == bool(options)
        own.dev("cut", 2) if options else own.kill_node(2)
    finally:
        own.dev("down")
    assert not living(pids)
    assert not steps(own)
    assert not devices(own)


def devices(cluster):
    """Return the network devices of this cluster on the host."""
    return [name for name in os.listdir("/sys/class/net") if name.startswith(f"bd{tag(cluster)}")]


def tag(cluster):
    name = next(line for line in (cluster.folder / "slurm.conf").read_text().splitlines() if "ClusterName" in line)
    return name.partition("=dev")[2]
