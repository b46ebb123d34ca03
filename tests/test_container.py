"""Check the images of `cluster/container`, as far as this works without a container engine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
CONTAINER = REPOSITORY / "cluster/container"


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    lines = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", dockerfile, flags=re.MULTILINE)).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line)]


def sections(definition: str) -> dict[str, str]:
    head, *rest = re.split(r"^%", definition, flags=re.MULTILINE)
    return {"": head} | {name: text for name, _, text in (section.partition("\n") for section in rest)}


def steps(shell: str) -> list[str]:
    return re.findall(r"image\.sh (system|install|check)", shell)


def test_both_images_take_the_same_steps_from_the_same_base_with_what_lies_beside_them() -> None:
    docker = instructions((CONTAINER / "Dockerfile").read_text())
    apptainer = sections((CONTAINER / "bd3_scale.def").read_text())
    assert steps("\n".join(rest for word, rest in docker if word == "RUN")) == ["system", "install", "check"]
    assert steps(apptainer["post"] + apptainer["test"]) == ["system", "install", "check"]
    (base,) = (rest.removeprefix("BASE=") for word, rest in docker if word == "ARG")
    assert f"BASE={base}" in apptainer["arguments"].split()
    assert re.fullmatch(r"python:3\.\d+-slim-\w+", base), "a tag, to which a digest can be added"
    python = re.search(r"\d\.\d+", base)[0]
    assert f"{{PYTHON:-python{python}}}" in (CONTAINER / "wheels.sh").read_text(), (
        "wheels of another Python do not install"
    )
    copied = [rest.split()[0] for word, rest in docker if word == "COPY"]
    bound = [line.split()[0] for line in apptainer["files"].splitlines() if line.strip()]
    assert set(copied) | {"wheels"} == set(bound)
    assert all((CONTAINER / name).is_file() for name in copied)
    assert [rest for word, rest in docker if word == "USER"] == ["1000"]
    assert [word for word, _ in docker].index("USER") > max(i for i, (word, _) in enumerate(docker) if word == "RUN")


@pytest.mark.slow
def test_the_steps_install_what_the_wheels_hold_into_an_empty_environment(tmp_path: Path) -> None:
    """Check this with the dependencies and pip of this environment, by a path; only the wheel has the package."""
    checkout, venv, wheels = (tmp_path / name for name in ("checkout", "venv", "wheels"))
    without_caches = shutil.ignore_patterns("__pycache__")
    for name in ("bd3_scale", "cluster/container"):
        shutil.copytree(REPOSITORY / name, checkout / name, ignore=without_caches)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "constraints-cuda.txt"):
        shutil.copy(REPOSITORY / name, checkout)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (venv / f"lib/python3.{sys.version_info[1]}/site-packages/carried.pth").write_text(sysconfig.get_path("purelib"))
    outer = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(script: str, *words: object, python: Path | str = venv / "bin/python") -> str:
        environment = outer | {"PYTHON": str(python), "WHEELS": str(wheels), "PATH": f"{venv}/bin:{os.environ['PATH']}"}
        done = subprocess.run(
            ["sh", checkout / "cluster/container" / script, *map(str, words)],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("wheels.sh", "--no-deps", "--no-build-isolation", python=sys.executable)
    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as file:
        packed = {name for name in file.namelist() if name.startswith("bd3_scale/")}
    package = checkout / "bd3_scale"
    assert packed == {str(path.relative_to(checkout)) for path in package.rglob("*") if path.is_file()}
    run("image.sh", "install", wheels)
    assert "torch" in run("image.sh", "check")
    where = [venv / "bin/python", "-c", "import bd3_scale; print(bd3_scale.__file__)"]
    imported = subprocess.run(where, env=outer, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert Path(imported.strip()).is_relative_to(venv)
