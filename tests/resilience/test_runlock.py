"""Test the lock of a run directory with two processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bd3_scale.resilience.runlock import is_in_use, lock_run

pytestmark = pytest.mark.launch

HOLD = """
import os, sys, time
from pathlib import Path
from bd3_scale.resilience.runlock import lock_run
with lock_run(Path(sys.argv[1])):
    if len(sys.argv) > 2 and os.fork() == 0:
        print("child", os.getpid(), flush=True)
        time.sleep(60)
    if len(sys.argv) <= 2:
        print("held", flush=True)
    time.sleep(60)
"""


def hold(run_dir: Path, *options: str) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run_dir), *options], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline()


def test_a_second_training_is_refused_and_told_who_holds_the_run(tmp_path: Path) -> None:
    process, line = hold(tmp_path)
    with process:
        assert line == "held\n"
        with pytest.raises(ValueError, match=f"process {process.pid} on {socket.gethostname()}"), lock_run(tmp_path):
            pass
        process.kill()


def test_who_only_asks_sees_a_holder_and_takes_nothing_from_it(tmp_path: Path) -> None:
    assert not is_in_use(tmp_path)  # without a lock's file
    process, _ = hold(tmp_path)
    with process:
        assert is_in_use(tmp_path)
        with pytest.raises(ValueError, match="is in use by process"), lock_run(tmp_path):
            pass
        process.kill()
    assert not is_in_use(tmp_path)


def test_a_killed_holder_leaves_the_run_free(tmp_path: Path) -> None:
    process, _ = hold(tmp_path)
    process.kill()
    process.communicate()
    with lock_run(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / ".lock").read_text()


def test_a_lock_that_leads_elsewhere_or_is_no_file_is_refused(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("thesis")
    (tmp_path / ".lock").symlink_to(precious)
    with pytest.raises(OSError, match=r"\.lock"), lock_run(tmp_path):
        pass
    assert precious.read_text() == "thesis"
    (tmp_path / ".lock").unlink()
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(ValueError, match=r"\.lock is not a regular file: remove it"), lock_run(tmp_path):
        pass


def test_a_forked_worker_that_outlives_its_killed_parent_does_not_keep_the_lock(tmp_path: Path) -> None:
    process, line = hold(tmp_path, "fork")
    worker = int(line.removeprefix("child "))
    process.kill()
    process.wait()
    try:
        os.kill(worker, 0)
        with lock_run(tmp_path):
            pass
    finally:
        os.kill(worker, 9)
        process.communicate()


def test_the_lock_ends_with_the_block(tmp_path: Path) -> None:
    with lock_run(tmp_path):
        pass
    process, line = hold(tmp_path)
    with process:
        assert line == "held\n"
        process.kill()


def test_missing_run_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), lock_run(tmp_path / "missing"):
        pass
