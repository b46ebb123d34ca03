"""Check what `make install-cuda` does before and during pip, on a machine that only seems to have a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[1]
# Package -> the reason why a CUDA installation has another version than a CPU's.
DIFFERS = {"triton": "torch's CUDA build fixes its own"}


def pins(name: str) -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in (REPOSITORY / name).read_text().splitlines())
    return {
        canonicalize_name(package): version for package, _, version in (line.partition("==") for line in lines if line)
    }


def test_both_constraints_have_the_same_versions() -> None:
    cpu, cuda = pins("constraints.txt"), pins("constraints-cuda.txt")
    assert cpu.keys() - cuda.keys() == set()
    assert {name for name in cpu if cpu[name] != cuda[name]} == DIFFERS.keys()


def test_both_constraints_are_what_the_package_requires() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = [Requirement(text) for text in [*project["dependencies"], *(text for extra in extras for text in extra)]]
    for name in ("constraints.txt", "constraints-cuda.txt"):
        pinned = pins(name)
        for requirement in wanted:
            if (package := canonicalize_name(requirement.name)) != "bd3-scale":
                assert requirement.specifier.contains(pinned[package]), (name, str(requirement))


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Copy what make reads, and write a Python whose virtual environments record the commands that they get."""
    for name in ("Makefile", "setup.py", "pyproject.toml", "constraints.txt", "constraints-cuda.txt"):
        shutil.copy(REPOSITORY / name, tmp_path)
    (tmp_path / "bd3_scale/launch").mkdir(parents=True)
    shutil.copy(REPOSITORY / "bd3_scale/launch/gpus.py", tmp_path / "bd3_scale/launch")
    program(tmp_path / "noting", 'echo "$(basename "$0") DS_BUILD_OPS=$DS_BUILD_OPS $*" >> noted')
    program(
        tmp_path / "python3",
        'case "$*" in "-m venv .venv") mkdir -p .venv/bin; cp noting .venv/bin/pip; cp noting .venv/bin/python;;'
        f' *) exec {shutil.which("python3")} "$@";; esac',
    )
    return tmp_path


def make(checkout: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # A `make test` around this test sets variables that would change this make.
    outer = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    path = {"PATH": f"{checkout}/bin:{os.environ['PATH']}"}
    command = ["make", *words, f"PYTHON={checkout}/python3"]
    return subprocess.run(
        command, cwd=checkout, env=outer | path | environment, capture_output=True, text=True, timeout=60, check=False
    )


def noted(checkout: Path) -> list[str]:
    path = checkout / "noted"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(
    ("smi", "words"),
    [
        (None, "nvidia-smi is not on this machine: no NVIDIA driver is installed"),
        (
            "echo 0, NVIDIA H100 80GB HBM3, 81559, 570.124.06, Disabled",
            "is 570.124.06, and builds for CUDA 13.0 need 580",
        ),
        ("echo couldn\\'t communicate with the NVIDIA driver; exit 9", "nvidia-smi fails: couldn't communicate"),
        ("echo No devices were found", "nvidia-smi finds no GPU"),
    ],
)
def test_no_work_begins_where_cuda_builds_cannot_run(checkout: Path, smi: str | None, words: str) -> None:
    if smi is None and shutil.which("nvidia-smi"):
        pytest.skip("this machine has a driver")
    if smi:
        program(checkout / "bin/nvidia-smi", smi)
    done = make(checkout, "install-cuda")
    assert done.returncode == 2
    told = done.stderr.splitlines()
    assert words in told[0]
    assert "make install is for machines without a GPU" in told[0]
    assert len(told) == 2, "one line, and make's own"
    assert not (checkout / ".venv").exists()


def test_torch_comes_first_and_the_environment_stays_a_cuda_one(checkout: Path) -> None:
    program(checkout / "bin/nvidia-smi", "echo 0, NVIDIA H100 80GB HBM3, 81559, 580.95.05, Disabled")
    done = make(checkout, "install-cuda")
    assert done.returncode == 0, done.stderr
    first, built, rest, second_transformers = noted(checkout)
    assert first.endswith("--constraint constraints-cuda.txt torch torchvision")
    assert "torch.version.cuda" in built
    assert re.search(r"DS_BUILD_OPS=0 .*--constraint constraints-cuda.txt --editable .\[dev\]", rest)
    assert "--no-deps" in second_transformers
    again = make(checkout, "install")
    assert (again.returncode, len(noted(checkout))) == (0, 4), "what is there already is not replaced by CPU builds"


def test_a_torch_without_cuda_ends_it_before_the_rest(checkout: Path) -> None:
    """Check an index of CPU builds in PIP_EXTRA_INDEX_URL: pip prefers their local version as newer."""
    program(checkout / "noting", 'echo "$*" >> noted; case "$*" in *version.cuda*) exit 1;; esac')
    done = make(checkout, "install-cuda", "DRIVER=elsewhere")
    assert (done.returncode, len(noted(checkout))) == (2, 2)
    assert not (checkout / ".venv/.installed-cuda").exists()
