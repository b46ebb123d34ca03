"""Check a console that breaks: training goes on and its log has the rest; a command that loses its result fails."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import forks
from tests.support.programs import BD3_SCALE
from tests.support.recipes import write_recipe
from tests.support.runs import losses, newest

RUN = Path(__file__).parents[1] / "fixtures/format-3/run"
START = """
import fcntl, os, pty, signal, subprocess, sys, termios, time
from pathlib import Path
command, run = sys.argv[1:], Path(sys.argv[-1].partition("=")[2])
"""
# `| head -1`
HEAD = """
process = subprocess.Popen(command, stdout=subprocess.PIPE)
process.stdout.readline()
process.stdout.close()
sys.exit(process.wait())
"""
FULL = """
full = open("/dev/full", "w")
sys.exit(subprocess.run(command, stdout=full, stderr=full).returncode)
"""
# A terminal whose window is closed: the kernel sends SIGHUP, and whoever writes gets EIO.
TERMINAL = """
# A suite under nohup ignores it.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
outer, inner = pty.openpty()
os.set_blocking(outer, False)
process = subprocess.Popen(
    command, stdin=inner, stdout=inner, stderr=inner, start_new_session=True,
    preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
)
os.close(inner)
metrics = run / "metrics.jsonl"
while not metrics.exists() or metrics.read_text().count("\\n") < 3:
    time.sleep(0.02)
    if select.select([outer], [], [], 0)[0]:
        os.read(outer, 1 << 16)
os.close(outer)
sys.exit(process.wait())
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, topics: Path) -> Path:
    folder = tmp_path_factory.mktemp("console")
    shutil.copytree(topics, folder / "data")
    write_recipe(folder / "recipe.yaml", logging={"every_steps": 1, "wandb": {"mode": "disabled"}})
    return folder


def train(place: Path, program: str, run: str, *overrides: str) -> str:
    """Train with the console that `program` makes, and return the run's log."""
    command = [BD3_SCALE, "train", "recipe.yaml", *overrides, f"run_dir={run}"]
    script = "import select" + START + program
    done = forks.run([sys.executable, "-c", script, *command], cwd=place, env=None)
    assert done.returncode == 0, done.stdout + done.stderr
    return (place / run / "logs/rank0.log").read_text()


def test_the_reader_of_a_training_goes_away(place: Path) -> None:
    log = train(place, HEAD, "head")
    note = "note: stdout is lost (Broken pipe): its output continues in head/logs/rank0.log\n"
    assert log.count(note) == 1
    first, _, _ = log.partition("\n")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \[rank 0\] \S.*", first), "kept from its first line on"
    assert "step 12: saved head/checkpoints/step-00000012\n" in log
    assert newest(place / "head") == 12


def test_the_disk_behind_both_streams_is_full(place: Path) -> None:
    log = train(place, FULL, "full")
    assert "note: stdout is lost (No space left on device)" in log
    assert "step 12: saved full/checkpoints/step-00000012\n" in log
    assert newest(place / "full") == 12


def test_a_terminal_hangs_up(place: Path) -> None:
    log = train(place, TERMINAL, "terminal", "train.steps=100000")
    step = max(losses(place / "terminal"))
    assert f"stopped after step {step} by SIGHUP: the same command continues from here\n" in log
    assert newest(place / "terminal") == step < 100000


@pytest.mark.parametrize("words", [["checkpoint", "list"], ["checkpoint", "list", "--json"], ["checkpoint", "verify"]])
def test_a_command_whose_result_is_lost_has_failed(words: list[str]) -> None:
    command = [BD3_SCALE, *words, RUN]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (2, "error: [Errno 28] No space left on device: 'stdout'\n")


def test_a_reader_that_has_enough_is_no_error_to_speak_of() -> None:
    command = [BD3_SCALE, "checkpoint", "list", RUN, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (1, b"")


def test_an_error_is_one_where_nobody_can_be_told() -> None:
    with Path("/dev/full").open("w") as full:
        command = [BD3_SCALE, "checkpoint", "list", "nowhere"]
        assert subprocess.run(command, stderr=full, timeout=60, check=False).returncode == 2
