"""Check that the GPU's day keeps to its time, leaves whole results however it ends, and has a dry form."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.attention.test_kernels_gpu import found_nothing
from tests.support.runs import is_alive, wait_for
from tools.gpu_day_wheels import BUILT, NEEDED

ROOT = Path(__file__).parents[2]
# The program and the one that it starts ignore SIGTERM.
HANGS = (
    "trap '' TERM; echo began; sleep 300 & echo $! > {folder}/started.new; mv {folder}/started.new {folder}/pid; wait"
)


def day(folder: Path, *arguments: object, programs: dict[str, str], **environment: str) -> subprocess.Popen[str]:
    """Start `tools/gpu_day.py --dry`, with these shell scripts as the machine's programs."""
    for name, script in programs.items():
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/sh\n" + script.format(folder=folder))
        path.chmod(0o755)
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tools/gpu_day.py"), "--dry", "--out", str(folder / "out"), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def only(*parts: str) -> list[str]:
    return [word for part in parts for word in ("--only", part)]


def result(folder: Path, part: str) -> dict[str, Any]:
    return json.loads((folder / "out" / f"{part}.json").read_text())


def test_parts_that_hang_are_killed_in_time_with_all_that_they_started(tmp_path: Path) -> None:
    began = time.monotonic()
    parts = only("environment", "kernels")
    process = day(tmp_path, *parts, "--minutes", 0.06, programs={"nvidia-smi": HANGS, "compute-sanitizer": HANGS})
    said, _ = process.communicate(timeout=60)
    assert time.monotonic() - began < 3.6 + 3
    assert process.returncode == 1, said
    for part in ("environment", "kernels"):
        found = result(tmp_path, part)
        assert found["status"] == "timed out"
        assert found["seconds"] >= found["limit_seconds"] > 0
        assert f"failed: {part}: timed out" in said
    if (tmp_path / "pid").exists():
        pid = int((tmp_path / "pid").read_text())
        wait_for(lambda: not is_alive(pid))


def test_a_signal_ends_it_with_what_was_found(tmp_path: Path) -> None:
    """Check a last part whose first tool finds nothing and whose second hangs; none of its processes goes on."""
    sanitizer = 'if [ "$2" = memcheck ]; then echo "========= ERROR SUMMARY: 0 errors"; exit; fi; ' + HANGS
    process = day(tmp_path, *only("sanitizer"), programs={"compute-sanitizer": sanitizer})
    wait_for((tmp_path / "pid").exists)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    said, _ = process.communicate(timeout=60)
    assert time.monotonic() - began < 5
    assert process.returncode == 128 + signal.SIGTERM, said
    found = result(tmp_path, "sanitizer")
    assert (found["status"], found["why"]) == ("interrupted", "by SIGTERM")
    rooms = ("attention", "fused")
    assert found["rows"] == [{"tool": "memcheck", "kernels": room, "found": "nothing"} for room in rooms]
    assert "began" in found["output"]
    assert re.search(r"in sanitizer$", found["output"], re.MULTILINE), "where it was is not shown"
    assert "| memcheck | fused | nothing |" in (tmp_path / "out/gpu_day.md").read_text()
    pid = int((tmp_path / "pid").read_text())
    wait_for(lambda: not is_alive(pid))


def test_what_comes_after_a_signal_is_told_as_not_run(tmp_path: Path) -> None:
    process = day(tmp_path, *only("environment", "kernels"), programs={"nvidia-smi": HANGS})
    wait_for((tmp_path / "pid").exists)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert result(tmp_path, "environment")["status"] == "interrupted"
    assert not (tmp_path / "out/kernels.json").exists()
    assert "failed: kernels: not run" in said


def test_a_part_that_fails_is_named_and_leaves_the_others_alone(tmp_path: Path) -> None:
    programs = {
        "nvidia-smi": "echo driver_version, clocks.current.sm [MHz]; echo 999.1, 345 MHz",
        "compute-sanitizer": "echo RACECHECK SUMMARY: 2 hazards displayed; exit 9",
    }
    process = day(tmp_path, *only("sanitizer", "environment"), programs=programs)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "failed: sanitizer: failed" in said
    assert "failed: environment" not in said
    failed, passed = result(tmp_path, "sanitizer"), result(tmp_path, "environment")
    assert (failed["status"], failed["rows"]) == ("failed", [])
    assert failed["why"].endswith("exit code 9: RACECHECK SUMMARY: 2 hazards displayed")
    assert passed["status"] == "ok"
    assert {"what": "GPU 0, driver_version", "is": "999.1"} in passed["rows"]
    text = (tmp_path / "out/gpu_day.md").read_text()
    assert "driver 999.1" in text
    assert "(dry" in text
    assert "- commit: " in text
    assert "python tools/gpu_day.py --dry" in text


def test_on_a_day_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, str(ROOT / "tools/gpu_day.py"), "--out", str(tmp_path), *only("step")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "PyTorch finds no CUDA device here: --dry is for a machine without one" in done.stdout
    assert json.loads((tmp_path / "step.json").read_text())["rows"] == []


def test_without_any_library_it_tells_each_wheel_at_its_tested_version() -> None:
    command = [sys.executable, "-S", str(ROOT / "tools/gpu_day.py"), "--list-wheels"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    pins = {line.partition("==")[0].lower(): line for line in (ROOT / "constraints.txt").read_text().splitlines()}
    for name in (*NEEDED, *BUILT):
        assert f" {pins[name.lower()]}" in said


# Only these distributions can be imported.
HIDING = """
import importlib.metadata, os, re, sys

def plain(name):
    return re.sub("[-_.]+", "-", name).lower()

known = importlib.metadata.packages_distributions()
allowed = set(map(plain, os.environ["ONLY_DISTRIBUTIONS"].split()))

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        owners = set(map(plain, known.get(name.partition(".")[0], ())))
        return None if owners and not owners & allowed else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Hiding, sys.meta_path)
"""
# PyTorch, and what comes with it; setuptools brings a more-itertools of its own.
WITH_TORCH = "torch triton filelock fsspec jinja2 markupsafe mpmath networkx setuptools sympy more-itertools"


@pytest.mark.slow
@pytest.mark.timeout(1300)
def test_the_whole_day_in_its_dry_form_with_what_the_wheels_bring_alone(tmp_path: Path) -> None:
    (tmp_path / "hiding").mkdir()
    (tmp_path / "hiding/sitecustomize.py").write_text(HIDING)
    environment = {"PYTHONPATH": str(tmp_path / "hiding")}
    environment["ONLY_DISTRIBUTIONS"] = " ".join((*NEEDED, *BUILT, WITH_TORCH, "bd3_scale"))
    process = day(tmp_path, "--minutes", 20, programs={}, **environment)
    said, _ = process.communicate(timeout=1250)
    parts = ("environment", "kernels", "fused", "training", "tuning", "attention", "step", "decoding", "memory")
    assert {part: result(tmp_path, part)["status"] for part in parts} == dict.fromkeys(parts, "ok"), said
    assert result(tmp_path, "sanitizer")["why"] == "compute-sanitizer is not on the PATH"
    assert process.returncode == 0
    rows = {part: result(tmp_path, part)["rows"] for part in parts}
    assert {row["backward"] for row in rows["kernels"] if "backward" in row} == {"deterministic", "fused"}
    assert all(row["GB/s"] > 0 for row in rows["fused"])
    assert [row["step"] for row in rows["training"][:-1]] == list(range(1, 21))
    assert {row["objective"] for row in rows["step"]} == {"bd3", "ar"}


@pytest.mark.parametrize(
    ("said", "clean"),
    [
        ("========= ERROR SUMMARY: 0 errors", True),
        ("========= ERROR SUMMARY: 10 errors", False),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", True),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)", False),
        ("the program ended", False),
    ],
)
def test_a_sanitizer_found_nothing_where_its_summary_says_so(said: str, clean: bool) -> None:
    assert found_nothing(said) is clean
