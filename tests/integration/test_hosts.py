"""Check that a run over two hosts takes the steps of one process: tensor parallel in a host, the rest between them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.integration import cases
from tests.integration.hosts import RANKS, Host, rank_by_variables, torchrun, two_hosts
from tests.integration.oracle import Oracle
from tests.integration.parity import TOLERANCE
from tests.support.forks import run_ranks

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    with two_hosts() as pair:
        yield pair


def test_hosts_reach_each_other_by_address_and_not_by_loopback(hosts: list[Host]) -> None:
    """Check that 127.0.0.1 is a different place on each host, so that what both reach goes over the cable."""
    python = [sys.executable, "-S", "-c"]
    serve = "import socket; s = socket.create_server(('', 29500)); print(flush=True); s.accept(); s.accept()"
    connect = "import socket, sys; print(socket.socket().connect_ex((sys.argv[1], 29500)) == 0)"
    with subprocess.Popen(hosts[0].command(*python, serve), stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout.readline()
            reached = [
                hosts[at].run(*python, connect, address).strip()
                for at, address in ((0, "127.0.0.1"), (1, "127.0.0.1"), (1, hosts[0].address))
            ]
        finally:
            server.kill()
    assert reached == ["True", "False", "True"]


@pytest.mark.parametrize(
    ("layout", "start", "processes"),
    [("tp2 pp2", torchrun, 2), ("tp2 zero3", rank_by_variables, 2 * RANKS)],
    ids=["pipeline across, by torchrun", "data parallel across, by variables"],
)
def test_two_hosts_take_the_steps_of_one_process(
    layout: str, start: Callable[..., None], processes: int, hosts: list[Host], tmp_path: Path
) -> None:
    out = tmp_path / "found.pt"
    run_ranks(start, processes, hosts, layout, out, logs=tmp_path, timeout=60)
    differ = Oracle().differences(cases.LAYOUTS[layout], torch.load(out))
    worst = max(differ, key=differ.__getitem__)
    assert differ[worst] <= TOLERANCE, (worst, differ[worst])
    for host in hosts:
        assert min(host.traffic()) > 1_000_000, f"{host.address} received and sent {host.traffic()} bytes"
