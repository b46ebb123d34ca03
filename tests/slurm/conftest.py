"""Start a real SLURM for the tests with `cluster/dev-slurm`, on its own ports and in its own folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.missing import unavailable

DEV_SLURM = Path(__file__).parents[2] / "cluster" / "dev-slurm"
DAEMONS = ("slurmctld", "slurmd", "munged")


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        self.env["SLURM_CONF"] = str(folder / "slurm.conf")

    def run(self, *argv: object, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        command = [str(word) for word in argv]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=timeout, check=False)

    def command(self, *argv: object) -> list[object]:
        return [DEV_SLURM, "--dir", self.folder, *argv]

    def dev(self, *argv: object) -> str:
        done = self.run(*self.command(*argv))
        assert done.returncode == 0, done.stderr
        return done.stdout

    def kill_node(self, node: int) -> None:
        self.dev("kill-node", node)

    def start_node(self, node: int) -> None:
        self.dev("start-node", node)

    def state(self, node: int) -> str:
        # `sinfo` goes on saying "mixed" after a job has left, until somebody asks in another way (SLURM 22.05).
        shown = self.run("scontrol", "show", "node", f"n{node}", "--oneliner").stdout
        return re.search(r" State=(\S+)", shown)[1].lower()

    def wait(self, condition: Callable[[], object], seconds: float, what: str) -> None:
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, f"waited {seconds:g} s for {what}"
            time.sleep(0.1)


def started(*options: str) -> Iterator[Cluster]:
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
    if missing := [name for name in DAEMONS if shutil.which(name, path=path) is None]:
        unavailable(f"needs a SLURM to start: {', '.join(missing)} missing (apt-get install slurm-wlm munge)")
    with tempfile.TemporaryDirectory(prefix="bd3-slurm-") as folder:  # a socket's path must be short
        cluster = Cluster(Path(folder))
        if worker := os.environ.get("PYTEST_XDIST_WORKER"):
            # Two that look for free ports at the same time may find the same: each worker has some of its own, below
            # those that dev-slurm would take.
            port = 10000 + 400 * int(worker.removeprefix("gw")) + 200 * ("--namespaces" in options)
            options = ("--port", str(port), *options)
        cluster.dev("up", *options)
        try:
            yield cluster
        finally:
            cluster.dev("down")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    yield from started()


@pytest.fixture(scope="session")
def as_root() -> None:
    """Skip a test unless it runs as root, which network namespaces need."""
    if os.geteuid() != 0:
        unavailable("network namespaces need root")


@pytest.fixture(scope="module")
def namespaced(as_root: None) -> Iterator[Cluster]:
    """Start three nodes, each in its own network namespace."""
    yield from started("--namespaces", "--nodes", "3")
