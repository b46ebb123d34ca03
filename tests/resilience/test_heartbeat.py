from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bd3_scale.launch.attempts import failures_without_progress
from bd3_scale.resilience.heartbeat import Heartbeat

pytestmark = pytest.mark.launch

RANK = """
import time
from bd3_scale.resilience.heartbeat import Heartbeat
with Heartbeat() as heartbeat:
    heartbeat.resumed(4)
    heartbeat.finished(5)
    time.sleep(60)
"""


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def test_it_tells_phase_step_and_save_and_how_it_ended(tmp_path, monkeypatch):
    monkeypatch.setenv("BD3_SCALE_HEARTBEATS", str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    status = tmp_path / "rank3.json"
    with Heartbeat() as heartbeat:
        heartbeat.finished(7)
        with heartbeat.during("checkpoint"):
            assert heartbeat._state["phase"] == "checkpoint"
        heartbeat.saved(7)
        heartbeat.end("done")
    assert {k: read(status)[k] for k in ("phase", "step", "saved")} == {"phase": "done", "step": 7, "saved": 7}
    with pytest.raises(ValueError, match="wrong"), Heartbeat() as heartbeat:
        raise ValueError("wrong")
    assert (read(status)["phase"], read(status)["error"]) == ("failed", "ValueError: wrong")


def test_without_a_supervisor_it_does_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("BD3_SCALE_HEARTBEATS", raising=False)
    monkeypatch.chdir(tmp_path)
    with Heartbeat() as heartbeat:
        heartbeat.finished(1)
    assert list(tmp_path.iterdir()) == []


def test_it_beats_while_the_process_runs_and_prints_stacks_when_asked(tmp_path):
    environment = os.environ | {"BD3_SCALE_HEARTBEATS": str(tmp_path), "RANK": "0"}
    process = subprocess.Popen([sys.executable, "-c", RANK], env=environment, stderr=subprocess.PIPE, text=True)
    status = tmp_path / "rank0.json"

    def wait_for_beat(beat: int) -> None:
        until = time.monotonic() + 30
        while read(status).get("beat", 0) < beat:
            assert time.monotonic() < until
            time.sleep(0.05)

    try:
        wait_for_beat(3)
        assert (read(status)["phase"], read(status)["step"], read(status)["saved"]) == ("step", 5, 4)
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.3)
        before = read(status)["beat"]
        time.sleep(2.5)
        assert read(status)["beat"] == before
        process.send_signal(signal.SIGUSR2)
        process.send_signal(signal.SIGCONT)
        wait_for_beat(before + 1)
    finally:
        process.kill()
    assert "most recent call first" in process.communicate()[1]


@pytest.mark.parametrize(
    ("attempts", "count"),
    [
        ([], 0),
        ([(0, 0, True, "a"), (0, 0, True, "a")], 2),
        ([(0, 0, True, "a"), (0, 5, True, "a"), (5, 5, True, "a")], 1),
        ([(0, 0, True, "a"), (0, 0, False, "a"), (0, 0, True, "a")], 2),
        ([(0, 0, True, "a"), (0, 0, True, "b")], 1),
        ([(0, 5, True, "a")], 0),
    ],
)
def test_failures_count_until_a_newer_checkpoint(attempts, count):
    """Check that planned stops neither count nor reset the count, and that a new submission resets it."""
    lines = [{"from_step": a, "saved": b, "failure": c, "submission": d} for a, b, c, d in attempts]
    assert failures_without_progress(lines) == count
