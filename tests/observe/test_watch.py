"""Check the live view of a run: appended lines are read once, curves are text, and it works in real terminals."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bd3_scale.observe.console import Console
from bd3_scale.observe.follow import RecordFollower, RunFollower
from bd3_scale.observe.text_plot import text_plot
from bd3_scale.observe.watch import dashboard, status_line, watch_run
from tests.observe.run_folders import make_run, train_record, write_lines

COMMAND = [str(Path(sys.executable).with_name("bd3-scale")), "watch"]
HOSTILE = "\x1b[2J[bold]name[/bold]"


def test_only_what_was_appended_is_read_and_an_unfinished_line_waits(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = RecordFollower(path)
    assert follower.refresh() == []  # there is no file yet
    write_lines(path, [{"step": 1, "train_loss": 5.0}])
    assert follower.refresh() == [{"step": 1, "train/loss": 5.0}]  # under this version's name
    with path.open("a") as file:
        file.write('{"step": 2, "train/loss": 4.0}\nnonsense\n{"step": 3, "tr')
        file.flush()
        assert [record["step"] for record in follower.refresh()] == [2]
        file.write('ain/loss": 3.0}\n')
        file.flush()
        assert follower.refresh() == [{"step": 3, "train/loss": 3.0}]
    assert follower.refresh() == []
    assert [record["step"] for record in follower.records] == [1, 2, 3]


@pytest.mark.parametrize("steps", [4, 8, 12])
def test_a_file_that_a_resumed_run_has_replaced_is_read_anew(tmp_path: Path, steps: int) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [{"step": step, "a": 1} for step in range(1, 9)])
    follower = RecordFollower(path)
    follower.refresh()
    new = [{"step": step, "a": 2} for step in range(1, steps + 1)]
    write_lines(tmp_path / "aside", new)
    os.replace(tmp_path / "aside", path)
    follower.refresh()
    assert follower.records == new


def test_a_file_that_was_cut_in_place_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [{"step": step} for step in range(1, 9)])
    follower = RecordFollower(path)
    follower.refresh()
    write_lines(path, [{"step": 1}])
    assert follower.refresh() == follower.records == [{"step": 1}]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.integers(14, 80), st.integers(2, 12))
def test_a_curve_in_characters_fills_its_lines(values: list[float], width: int, height: int) -> None:
    lines = text_plot(range(len(values)), values, width, height)
    assert [len(line) for line in lines] == [width] * height
    dots = [any(0x2800 < ord(character) <= 0x28FF for character in line) for line in lines]
    assert any(dots)
    if max(lines) != min(lines) and lines[0].split()[0] != lines[-1].split()[0]:
        assert dots[0]  # the highest median
        assert dots[-1]  # and the lowest


def test_a_falling_curve_falls() -> None:
    lines = text_plot([0, 1, 2, 3], [3.0, 2.0, 1.0, 0.0], 14, 4)
    firsts = [next(i for i, character in enumerate(line[11:]) if character != "⠀") for line in lines]
    assert firsts == sorted(firsts)
    assert (lines[0].split()[0], lines[-1].split()[0]) == ("3", "0")


def test_the_screen_has_the_numbers_and_nothing_of_a_stranger_s_markup(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    write_lines(
        folder / "samples.jsonl", [{"step": 1, "kind": "sample", "prompt": HOSTILE, "text": "answer", "nfe": 3}]
    )
    run, _ = RunFollower(folder).refresh()
    console = Console(width=120, height=40, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(dashboard(run, console))
    text = console.export_text()
    assert r"\x1b[2J[bold]name[/bold]" in text
    for words in ("tiny  done", "step 100 of 100", "learning rate", "held-out NELBO: now 5.0000", "1.50 GiB"):
        assert words in text
    assert "loss spike" in text
    assert "step 100" in text


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_that_has_hardly_begun_is_shown(tmp_path: Path, steps: int) -> None:
    folder = make_run(tmp_path / "run")
    write_lines(folder / "metrics.jsonl", [train_record(step) for step in range(1, steps + 1)])
    run, _ = RunFollower(folder).refresh()
    console = Console(width=80, height=24, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(dashboard(run, console))
    assert ("nothing is recorded yet" in console.export_text()) is True
    assert status_line(run).startswith(f"tiny: {'not running' if steps else 'not started'}  step {steps}/100")


def test_where_there_is_no_terminal_lines_are_printed_while_a_process_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path / "run")
    write_lines(folder / "metrics.jsonl", [train_record(1)])
    trains = iter([True, True, False])
    monkeypatch.setattr("bd3_scale.observe.follow.is_in_use", lambda _: next(trains))

    def pause(_: float) -> None:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(train_record(2) | {"checkpoint/tries": 1, "checkpoint/failed": 1}) + "\n")

    watch_run(RunFollower(folder), Console(highlight=False), pause=pause)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("tiny: training  step 1/100  loss ")
    assert "ETA 0:00:25" in said[0]
    assert said[1] == "step 2: not saved"
    assert said[2].startswith("tiny: training  step 2/100")
    assert said[-1].startswith(f"no process trains in {folder}")


def test_steps_that_do_not_rise_are_drawn_in_order(tmp_path: Path) -> None:
    folder, shuffled = make_run(tmp_path / "run"), make_run(tmp_path / "shuffled/run")
    write_lines(folder / "metrics.jsonl", [train_record(step) for step in (1, 2, 3, 9)])
    repeated = train_record(3, **{"train/loss": 50.0})
    write_lines(shuffled / "metrics.jsonl", [repeated, *(train_record(step) for step in (9, 2, 3, 1))])
    curves = []
    for each in (folder, shuffled):
        run, _ = RunFollower(each).refresh()
        console = Console(width=120, height=40, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        console.print(dashboard(run, console))
        curves.append([line for line in console.export_text().splitlines() if "⠀" in line])
    assert curves[0] == curves[1]


def test_metrics_that_are_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").mkdir()
    with pytest.raises(IsADirectoryError, match=r"Is a directory: '.*/run/metrics\.jsonl'"):
        RunFollower(folder).refresh()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no run directory"):
        RunFollower(tmp_path)


@pytest.mark.slow
def test_ctrl_c_ends_it_well_on_a_terminal(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    write_lines(folder / "metrics.jsonl", [train_record(1)])
    master, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    with subprocess.Popen([*COMMAND, str(folder)], stdin=terminal, stdout=terminal, env=environment) as process:
        os.close(terminal)
        said = b""
        deadline = time.monotonic() + 60
        while b"learning rate" not in said:
            assert time.monotonic() < deadline, said
            said += os.read(master, 1 << 16)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(train_record(2)) + "\n")
        while b"step 2 of 100" not in said:
            assert time.monotonic() < deadline, said
            said += os.read(master, 1 << 16)
        process.send_signal(signal.SIGINT)
        while b"tiny: not running  step 2/100" not in said:
            assert time.monotonic() < deadline, said
            said += os.read(master, 1 << 16)
        assert process.wait(30) == 0
    os.close(master)


@pytest.mark.slow
def test_the_command_ends_with_a_run_that_is_done(tmp_path: Path) -> None:
    result = subprocess.run([*COMMAND, str(make_run(tmp_path / "run"))], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("tiny: done  step 100/100  loss ")
