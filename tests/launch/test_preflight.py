from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bd3_scale.launch.preflight import slow_nodes, uncorrected_errors, wrong_clocks

pytestmark = pytest.mark.launch

CLUSTER = Path(__file__).parents[2] / "cluster"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def preflight(
    out: Path, *ranks: Sequence[object], nodes: int | None = None, timeout: int = 60
) -> tuple[list[int], list[dict[str, Any]], str]:
    """Run one process for each of `ranks`, which are its options; return exit codes, reports and stderr of all."""
    port, processes = str(free_port()), []
    for rank, options in enumerate(ranks):
        slurm = {"SLURM_PROCID": str(rank), "SLURM_NTASKS": str(nodes or len(ranks)), "SLURMD_NODENAME": f"n{rank}"}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "bd3_scale.launch.preflight", "--out", out, "--timeout", timeout, *options]
        environment = os.environ | slurm | meeting | {"GLOO_SOCKET_IFNAME": "lo"}
        processes.append(
            subprocess.Popen([str(w) for w in command], env=environment, stderr=subprocess.PIPE, text=True)
        )
    try:
        errors = "".join(process.communicate(timeout=timeout + 10)[1] for process in processes)
    finally:
        for process in processes:
            process.kill()
    reports = [json.loads((out / f"n{rank}.json").read_text()) for rank in range(len(ranks))]
    return [process.returncode for process in processes], reports, errors


def test_nodes_that_are_well(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    out = tmp_path / "run/preflight"
    codes, reports, errors = preflight(out, *[["--scratch", scratch, "--min-free-gb", 0.001]] * 2)
    assert codes == [0, 0], errors
    assert sorted(path.name for path in out.iterdir()) == ["n0.json", "n1.json"]
    assert list(scratch.iterdir()) == []
    for rank, report in enumerate(reports):
        assert {k: report[k] for k in ("node", "ok", "problems")} == {"node": f"n{rank}", "ok": True, "problems": []}
        assert report["measured"]["gpus"] == 0
        assert report["measured"]["free_gb"] > 0.001
        assert abs(report["measured"]["clock_offset_s"]) < 1
        assert 0.01 < report["measured"]["allreduce_gbps"] < 1000
        assert "links_gbps" not in report["measured"]


def test_a_slow_interconnect_without_a_culprit_is_the_jobs(tmp_path: Path) -> None:
    codes, reports, errors = preflight(tmp_path, *[["--scratch", tmp_path, "--min-allreduce-gbps", 1e6]] * 3)
    assert codes == [1, 1, 1], errors
    for report in reports:
        assert report["ok"]
        (problem,) = report["job_problems"]
        assert "1e+06 GB/s are needed" in problem
        assert "no node stands out" in problem
        assert len(report["measured"]["links_gbps"]) == 3
        assert all(0.01 < link < 1000 for link in report["measured"]["links_gbps"])


def test_a_bad_node_says_why_and_keeps_nobody_waiting(tmp_path: Path) -> None:
    bad = ["--scratch", tmp_path / "nowhere", "--gpus", 1]
    codes, (well, ill), errors = preflight(tmp_path, ["--scratch", tmp_path], bad)
    assert codes == [0, 3], errors
    assert well["ok"]
    assert not ill["ok"]
    gpus, scratch = ill["problems"]
    assert "0 GPUs are visible and 1 are needed" in gpus
    assert f"{tmp_path / 'nowhere'} is missing" in scratch
    assert gpus in errors
    assert "clock_offset_s" in ill["measured"]


def test_too_little_room_and_a_node_that_never_comes(tmp_path: Path) -> None:
    start = time.monotonic()
    options = ["--scratch", tmp_path, "--min-free-gb", 1e9]
    codes, (ill,), errors = preflight(tmp_path, options, nodes=2, timeout=12)
    assert time.monotonic() - start < 12 + 4
    assert codes == [3], errors
    assert "GB are needed" in ill["problems"][0]
    assert "could not connect to the other nodes" in ill["job_problems"][0]
    assert ill["measured"]["free_gb"] > 0


def test_a_hanging_tool_is_the_nodes_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexec sleep 20\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    codes, (ill,), errors = preflight(tmp_path, ["--scratch", tmp_path, "--gpus", 1], timeout=2)
    assert codes == [3], errors
    assert ill["problems"] == ["nvidia-smi hung: not done 2 s after the start (--timeout)"]


def test_the_script_of_the_cluster_folder() -> None:
    done = subprocess.run(
        [sys.executable, CLUSTER / "preflight", "--help"], capture_output=True, text=True, timeout=20, check=True
    )
    assert "--max-clock-skew" in done.stdout


@pytest.mark.parametrize(
    ("times", "wrong"),
    [
        ([100.0, 100.4, 99.8], []),
        ([100.0, 107.0, 100.1], [1]),
        ([93.0, 100.0, 100.0, 100.2], [0]),
        ([100.0, 107.0], []),  # which of them?
        ([100.0, 100.0, 107.0, 107.0], []),
    ],
)
def test_clocks(times: list[float], wrong: list[int]) -> None:
    offsets, found = wrong_clocks(times, 5)
    assert found == wrong
    assert (max(map(abs, offsets)) > 5) == (max(times) - min(times) > 5)


@pytest.mark.parametrize(
    ("links", "slow"),
    [
        ([1, 1, 9], [1]),
        ([9, 1, 1], [2]),
        ([1, 9, 1], [0]),
        ([1, 1, 1], []),
        ([9, 1, 9], []),  # a cable between two
        ([1, 1, 9, 1, 1, 9], [1, 4]),
        ([1, 1, 1, 1, 9, 9], []),
        ([], []),
    ],
)
def test_slow_nodes(links: list[float], slow: list[int]) -> None:
    assert slow_nodes(links, 5) == slow


def test_uncorrected_errors() -> None:
    assert uncorrected_errors("0, 0\n1, 12\n2, [N/A]\n") == {"1": 12}
