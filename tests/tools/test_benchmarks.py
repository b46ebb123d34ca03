"""Check that a table is replaced whole by a tool's output or stays, however the tool or the runner ends."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.runs import is_alive, wait_for
from tools import benchmarks
from tools.benchmarks import PARTS, Part, with_table

TABLE = "| a | b |\n|---|---|\n| 1 | 2 |"
PAGE = "# Page\n\n<!-- begin: one -->\n\nold\n\n<!-- end: one -->\n\nafter <!-- begin: two --><!-- end: two -->\n"
NEW = PAGE.replace("\n\nold\n\n", f"\n\n{TABLE}\n\n")


def tool(code: str) -> str:
    return f"python -c {shlex.quote(code)}"


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a page in a folder that replaces benchmarks/."""
    monkeypatch.setattr(benchmarks, "ROOT", tmp_path)
    monkeypatch.setattr(benchmarks, "FOLDER", tmp_path)
    monkeypatch.setattr(benchmarks, "LOGS", tmp_path / "logs")
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    return path


def renew(monkeypatch: pytest.MonkeyPatch, *arguments: str, **parts: Part) -> int:
    monkeypatch.setattr(benchmarks, "PARTS", parts)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        return benchmarks.main(arguments)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_what_a_tool_prints_takes_the_table_s_place(page, monkeypatch, capsys) -> None:
    code = f"import os, sys; print(os.environ['OMP_NUM_THREADS'], file=sys.stderr); print({TABLE!r})"
    assert renew(monkeypatch, one=Part("page.md", f"OMP_NUM_THREADS=3 {tool(code)}", 1)) == 0
    assert page.read_text() == NEW
    assert (page.parent / "logs/one.log").read_text() == "3\n"
    assert "one: benchmarks/page.md renewed" in capsys.readouterr().out


def test_a_bare_table_gets_its_conditions(page, monkeypatch) -> None:
    command = tool(f"print({TABLE!r})")
    assert renew(monkeypatch, one=Part("page.md", command, 1, bare=True)) == 0
    told = page.read_text().partition("one -->\n\n")[2].partition(f"\n\n{TABLE}\n\n<!-- end: one")[0].splitlines()
    assert [line.split(": ")[0] for line in told] == ["- hardware", "- versions", "- commit", "- command"]
    assert told[3] == f"- command: {command}"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (f"print({TABLE!r}); import sys; sys.exit('no such number')", "exit status 1: no such number"),
        (f"print({TABLE!r}, flush=True); import os; os.kill(os.getpid(), 9)", "ended by SIGKILL"),
        (f"print({TABLE!r}, flush=True); import time; time.sleep(60)", "killed at its limit"),
        ("print('| a | b |')", "it printed no table"),
    ],
)
def test_a_tool_that_ends_otherwise_changes_nothing(page, monkeypatch, capsys, code, words) -> None:
    part = Part("page.md", tool(code), 1 / 60 if "sleep" in code else 1)
    good = Part("page.md", tool(f"print({TABLE!r})"), 1)
    assert renew(monkeypatch, two=part, one=good) == 1
    assert page.read_text() == NEW
    out = capsys.readouterr().out
    assert f"two: NOT renewed: {words}" in out
    assert "one: benchmarks/page.md renewed" in out


@pytest.mark.parametrize(
    "text",
    [
        "no place",
        "<!-- begin: one -->",
        "<!-- end: one --> <!-- begin: one -->",
        PAGE + "<!-- begin: one -->",
        PAGE + "<!-- end: one -->",
    ],
)
def test_without_one_place_for_its_table_no_tool_runs(page, monkeypatch, capsys, text) -> None:
    page.write_text(text)
    assert renew(monkeypatch, one=Part("page.md", tool("open('ran', 'w')"), 1)) == 1
    assert page.read_text() == text
    assert not (page.parent / "ran").exists()
    assert "the table's place is from <!-- begin: one --> to <!-- end: one -->, each once" in capsys.readouterr().out


def test_what_was_written_meanwhile_stays(page, monkeypatch) -> None:
    code = f"open('page.md', 'a').write('more\\n'); print({TABLE!r})"
    assert renew(monkeypatch, one=Part("page.md", tool(code), 1)) == 0
    assert page.read_text() == NEW + "more\n"


RUNNER = """
import pathlib, sys
from tools import benchmarks
here = pathlib.Path(sys.argv[1])
benchmarks.ROOT = benchmarks.FOLDER = here
benchmarks.LOGS = here / "logs"
benchmarks.PARTS = {"one": benchmarks.Part("page.md", sys.argv[2], 1)}
sys.exit(benchmarks.main([]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_runner_that_is_ended_leaves_neither_table_nor_tool(page, number) -> None:
    code = (
        f"import os, time; print({TABLE!r}, flush=True); open('pid', 'w').write(f'{{os.getpid()}}\\n'); time.sleep(60)"
    )
    command = [sys.executable, "-c", RUNNER, str(page.parent), tool(code)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[2]) as runner:
        pid = page.parent / "pid"
        wait_for(lambda: pid.exists() and pid.read_text().endswith("\n"))
        began = time.monotonic()
        runner.send_signal(number)
        assert runner.wait(30) == 128 + number
        assert time.monotonic() - began < 20
    assert not is_alive(int(pid.read_text()))
    assert page.read_text() == PAGE


def test_what_needs_more_is_left_out_unless_it_is_asked_for(page, monkeypatch, capsys) -> None:
    code = tool(f"open('ran', 'a').write('x'); print({TABLE!r})")
    parts = {"one": Part("page.md", code, 1, "a day"), "two": Part("page.md", tool(f"print({TABLE!r})"), 1)}
    ran = page.parent / "ran"
    assert renew(monkeypatch, "--list", **parts) == 0
    assert "one: benchmarks/page.md, at most 1 minutes, needs a day" in capsys.readouterr().out
    assert page.read_text() == PAGE
    assert renew(monkeypatch, **parts) == 0
    assert f"one: left out, needs a day: {code}" in capsys.readouterr().out
    assert not ran.exists()
    for times, arguments in enumerate((["--all"], ["--only", "one"]), 1):
        assert renew(monkeypatch, *arguments, **parts) == 0
        assert ran.read_text() == "x" * times


@pytest.mark.parametrize("name", PARTS)
def test_each_table_has_its_place_and_its_tool(name: str) -> None:
    part = PARTS[name]
    words = [word for word in shlex.split(part.command) if "=" not in word]
    assert words[0] == "python"
    program = Path(words[words.index("-m") + 1].replace(".", "/") + ".py" if "-m" in words else words[1])
    assert (benchmarks.ROOT / program).is_file()
    text = (benchmarks.FOLDER / part.file).read_text()
    assert with_table(with_table(text, name, "new"), name, "") != text
