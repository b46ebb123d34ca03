"""Test real broken streams: readers that go away, full disks, terminals that hang up or are stopped."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.launch

# Writes from Python, from C and from a child; ends as a program does that has not noticed.
SPEAKER = """
import ctypes, subprocess, sys
from pathlib import Path
from bd3_scale.resilience.output import survive_broken_streams
survive_broken_streams("stdout", "stderr", log=Path(sys.argv[1]), patience=0.2)
for number in range(3):
    print("line", number)
    print("error", number, file=sys.stderr)
libc = ctypes.CDLL(None)
libc.puts(b"from C")
libc.fflush(None)
subprocess.run(["echo", "from a child"], stdout=sys.stdout, check=False)
print("the end", end="")
"""


def speak(log: Path, program: str = SPEAKER, **streams: Any) -> int:
    command = [sys.executable, "-c", program, log]
    return subprocess.run(command, **streams, timeout=60, check=False).returncode


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_went_away_ends_nothing_and_the_log_has_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbuffered: str
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    read, write = os.pipe()
    os.close(read)
    log = tmp_path / "logs/rank0.log"
    with (tmp_path / "stderr").open("w") as stderr:
        assert speak(log, stdout=write, stderr=stderr) == 0
    note = f"note: stdout is lost (Broken pipe): its output continues in {log}\n"
    assert log.read_text() == f"{note}line 0\nline 1\nline 2\nfrom C\nfrom a child\nthe end"
    assert (tmp_path / "stderr").read_text() == f"{note}error 0\nerror 1\nerror 2\n"


def test_a_full_disk_behind_both_streams_ends_nothing_and_the_log_has_both(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        assert speak(tmp_path / "log", stdout=full, stderr=full) == 0
    lines = (tmp_path / "log").read_text().splitlines()
    assert {f"{word} {number}" for word in ("line", "error") for number in range(3)} <= set(lines)
    assert sum("stderr is lost (No space left on device)" in line for line in lines) == 1


def test_where_the_log_is_full_as_well_what_is_said_is_lost(tmp_path: Path) -> None:
    (tmp_path / "log").symlink_to("/dev/full")
    with Path("/dev/full").open("w") as full:
        assert speak(tmp_path / "log", stdout=full, stderr=full) == 0


def test_closed_streams_are_no_error_and_no_file_takes_their_place(tmp_path: Path) -> None:
    program = """
import os, sys
from pathlib import Path
from bd3_scale.resilience.output import reserve_standard_descriptors, survive_broken_streams
reserve_standard_descriptors()
survive_broken_streams("stdout", "stderr", log=Path(sys.argv[1]))
with Path(sys.argv[1]).open("w") as file:
    assert file.fileno() > 2
    os.write(1, b"by C")
    print("by Python")
"""
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", program, tmp_path / "file"]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0
    assert (tmp_path / "file").read_text() == ""


def test_a_terminal_that_is_stopped_holds_nobody_up(tmp_path: Path) -> None:
    outer, inner = pty.openpty()
    os.write(outer, b"\x13")  # Ctrl-S
    program, _, _ = SPEAKER.partition("libc = ")
    assert speak(tmp_path / "log", program, stdout=inner, stderr=inner) == 0
    assert (tmp_path / "log").read_text().count("stdout has no reader") == 1
    os.close(inner)
    os.close(outer)


def test_a_pipe_that_nobody_reads_holds_nobody_up_and_gets_what_is_said_once_it_is_read(tmp_path: Path) -> None:
    program = """
import os, sys
from pathlib import Path
from bd3_scale.resilience.output import survive_broken_streams
survive_broken_streams("stdout", log=Path(sys.argv[1]), patience=0.2)
for _ in range(2000):
    print("x" * 99)
print("waits", file=sys.stderr)
sys.stdin.read()
print("the end")
"""
    command = [sys.executable, "-c", program, tmp_path / "log"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert b"has no reader" in process.stderr.readline()
        assert process.stderr.readline() == b"waits\n"
        assert process.stdout is not None
        held = os.read(process.stdout.fileno(), 1 << 20)
        said, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert 2000 * 100 > len(held + said) >= 1 << 14
    assert said.endswith(b"the end\n")
    assert (tmp_path / "log").read_text().count("has no reader") == 1


RESULT = """
import sys
from bd3_scale.resilience.output import flush_results, writing_results
try:
    with writing_results():
        print("the result")
    flush_results()
except OSError as error:
    sys.exit(f"told: {error}")
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_result_that_cannot_be_written_is_an_error_that_names_stdout(
    monkeypatch: pytest.MonkeyPatch, unbuffered: str
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-c", RESULT]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    # Not Python's own 120 of a stream that it cannot flush at its end.
    assert (done.returncode, done.stderr) == (1, "told: [Errno 28] No space left on device: 'stdout'\n")


KEEPS = """
import os, subprocess, sys
from pathlib import Path
from bd3_scale.resilience.output import survive_broken_streams
from bd3_scale.resilience.terminal import tell
from bd3_scale.observe.progress import TrainingProgress
survive_broken_streams("stderr")
survive_broken_streams("stdout", "stderr", log=Path(sys.argv[1]), label="rank 0", copies=True, patience=0.2)
with TrainingProgress(3) as progress:
    for step in (1, 2, 3):
        progress.step(step, train_loss=2.0, tokens_per_second=9.0)
        progress.message(f"step {step}: saved \\x1b[31mred")
print("two\\nlines", end="")
print(" and an end")
tell("error: of stderr")
subprocess.run(["echo", "from a child"], check=False)
"""
STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \[rank 0\] "
KEPT = ["step 1: saved \\x1b[31mred", "two", "lines and an end", "error: of stderr"]


def unstamped(lines: list[str]) -> list[str]:
    assert all(re.match(STAMP, line) for line in lines), lines
    return [re.sub(STAMP, "", line, count=1) for line in lines]


def test_lines_carry_time_and_speaker_and_are_kept_over_attempts(tmp_path: Path) -> None:
    log = tmp_path / "logs/rank0.log"
    for attempt in (1, 2):
        with (tmp_path / "console").open("w") as console:
            assert speak(log, KEEPS, stdout=console, stderr=console) == 0
        said = (tmp_path / "console").read_text().splitlines()
        said.remove("from a child")
        kept = unstamped(log.read_text().splitlines())
        assert len(kept) == attempt * len(said), "every line once"
        assert kept[-len(said) :] == unstamped(said)
        assert set(KEPT) < set(kept)
        assert sum(line.startswith("step 3/3  loss 2.0000") for line in kept) == attempt


def test_a_terminal_shows_the_time_alone_and_its_bar_is_not_kept(tmp_path: Path) -> None:
    outer, inner = pty.openpty()
    log = tmp_path / "rank0.log"
    with subprocess.Popen([sys.executable, "-c", KEEPS, log], stdout=inner, stderr=inner) as process:
        os.close(inner)
        shown = b""
        with contextlib.suppress(OSError):  # the terminal has no writer any more
            while piece := os.read(outer, 1 << 16):
                shown += piece
        assert process.wait(60) == 0
    os.close(outer)
    assert re.search(rb"\d\d:\d\d:\d\d step 1: saved", shown)
    assert b"[rank 0]" not in shown
    text = log.read_text()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text)
    kept = unstamped(text.splitlines())
    assert set(KEPT) < set(kept)
    assert [line for line in kept if line.startswith("step 2")] == ["step 2: saved \\x1b[31mred"]


def test_what_breaks_in_the_middle_is_kept_once(tmp_path: Path) -> None:
    log, program = tmp_path / "rank0.log", KEEPS.replace("print(", "os.dup2(full, 1); print(", 1)
    program = program.replace("import os,", "import os; full = os.open('/dev/full', os.O_WRONLY)\nimport os,", 1)
    with (tmp_path / "console").open("w") as console:
        assert speak(log, program, stdout=console, stderr=console) == 0
    kept = [line for line in log.read_text().splitlines() if line != "from a child"]
    kept = [re.sub(STAMP, "", line, count=1) for line in kept]
    for words in (*KEPT, "stdout is lost"):
        assert "\n".join(kept).count(words) == 1, kept
