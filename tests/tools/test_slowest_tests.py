"""Check where the time of tests goes: by run, folder and test, from the reports of real runs of pytest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import forks

TOOL = Path(__file__).parents[2] / "tools" / "slowest_tests.py"
SLOW = """
import time, pytest
@pytest.fixture
def prepared():
    time.sleep(0.3)
@pytest.mark.parametrize("text", ["a/b.c", "x|y"])
def test_waits(prepared, text):
    pass
def test_is_quick():
    pass
def test_is_left_out():
    pytest.skip("not here")
"""


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    for folder in ("tests/model", "tests"):
        (tmp_path / folder).mkdir(exist_ok=True, parents=True)
        (tmp_path / folder / "test_it.py").write_text(SLOW)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--import-mode=importlib",
        "--junit-xml=build/tests/one.xml",
        "tests",
    ]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    return tmp_path


def rows(text: str) -> dict[str, list[str]]:
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {name: rest for name, *rest in cells}


def test_set_up_counts_and_a_skip_does_not(reports: Path) -> None:
    found = rows(forks.run([sys.executable, TOOL], cwd=reports).stdout)
    assert found["one"][0] == "6"
    assert found["model"][0] == found["."][0] == "3"
    for name in ("`model/test_it.py::test_waits[a/b.c]`", r"`test_it.py::test_waits[x\|y]`"):
        assert 0.3 <= float(found[name][0]) < 3
    assert float(found["`test_it.py::test_is_quick`"][0]) < 0.3
    assert not any("left_out" in name for name in found)


def test_its_part_of_a_page_is_replaced(reports: Path) -> None:
    page = reports / "page.md"
    page.write_text("before\n<!-- slowest tests -->\nyesterday\n<!-- end of slowest tests -->\nafter\n")
    for _ in range(2):
        done = forks.run([sys.executable, TOOL, "--markdown", page, "--most", 2], cwd=reports)
        assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert text.startswith("before\n<!-- slowest tests -->\n\nOn ")
    assert text.endswith("|\n\n<!-- end of slowest tests -->\nafter\n")
    assert "yesterday" not in text
    assert sum(name.startswith("`") for name in rows(text)) == 2


def test_what_it_cannot_read_it_says(tmp_path: Path) -> None:
    nothing = forks.run([sys.executable, TOOL], cwd=tmp_path)
    assert nothing.returncode == 2
    assert "holds no report" in nothing.stderr
    (tmp_path / "bad.xml").write_text("<testsuites")
    bad = forks.run([sys.executable, TOOL, "."], cwd=tmp_path)
    assert bad.returncode
    assert "bad.xml is no report of pytest" in bad.stderr
