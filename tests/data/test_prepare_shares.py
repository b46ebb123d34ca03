"""Test `bd3-scale data prepare --tasks`: shares of the work, and the scripts of an array, run without SLURM."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from bd3_scale.cli import app
from bd3_scale.data import submit, tasks
from bd3_scale.data.manifest import load_manifest
from tests.data.documents import random_texts, write_jsonl
from tests.data.test_tasks import files_of

SOURCE = '-a name\'with $(odd) "marks".jsonl'
OPTIONS = ["--out", "my out", "--tokenizer", "bytes", "--seq-len", "32", "--no-bos", "--parse-special", "--seed", "7"]
OPTIONS += ["--holdout", "0.25", "--workers", "1"]
SITE = {"partition": "main", "gpus_per_node": 8, "cpus_per_process": 4, "memory": "0", "time_limit": "1:00:00"}


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks, "TASK_BYTES", 2000)
    write_jsonl(tmp_path / SOURCE, random_texts(150))
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(SITE))


def prepare(*options: str) -> Any:
    done = CliRunner().invoke(app, ["data", "prepare", f"./{SOURCE}", *OPTIONS, "--json", *options])
    if isinstance(done.exception, ValueError):
        raise done.exception
    return json.loads(done.stdout)


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Replace SLURM by a recorder of commands that accepts everything."""
    told: list[tuple[str, ...]] = []
    monkeypatch.setattr(submit, "slurm", lambda *command, **how: told.append(command) or f"{len(told)};cluster\n")
    monkeypatch.setattr(submit, "ask_slurm", lambda script: None)
    monkeypatch.setattr(submit, "job_states", lambda jobs: dict.fromkeys(jobs, "COMPLETED"))
    return told


def run_script(name: str, **environment: str) -> None:
    """Run a script as SLURM does; srun only executes its command."""
    srun = Path("bin/srun")
    srun.parent.mkdir(exist_ok=True)
    srun.write_text('#!/bin/bash\nwhile [[ "$1" == --* ]]; do shift; done\nexec "$@"\n')
    srun.chmod(0o755)
    path = f"{srun.parent.absolute()}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", Path("my out.tasks", name)],
        env=os.environ | {"PATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def directives(name: str) -> list[str]:
    lines = Path("my out.tasks", name).read_text().splitlines()
    return [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]


@pytest.mark.launch
def test_the_scripts_do_what_the_command_says(slurm: list[tuple[str, ...]]) -> None:
    told = prepare("--slurm", "site.yaml", "--tasks", "3")
    assert told["jobs"] == ["1", "2"]
    folder = Path("my out.tasks").absolute()
    after = ["--dependency=afterok:1", "--kill-on-invalid-dep=yes"]
    assert slurm == [
        ("sbatch", "--parsable", f"{folder}/array.sh"),
        ("sbatch", "--parsable", *after, f"{folder}/merge.sh"),
    ]
    asked = directives("array.sh")
    for directive in ("nodes=1", "ntasks-per-node=1", "cpus-per-task=32", "mem=0", "array=0-2", "requeue"):
        assert directive in asked
    assert not any(directive.startswith("gpus") for directive in asked)
    assert "array=0-2" not in directives("merge.sh")
    # In these processes tasks have their usual size, but what was planned stays.
    num_tasks = len(tasks.read_plan(folder / "plan.json").tasks)
    assert num_tasks > 3
    run_script("array.sh", SLURM_ARRAY_TASK_ID="1")
    done = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name != "logs")
    assert done == [f"{number:05}" for number in range(1, num_tasks, 3)]
    # Submitted again, there is only what is missing.
    prepare("--slurm", "site.yaml", "--tasks", "3")
    assert "array=0,2" in directives("array.sh")
    for share in (0, 2):
        assert prepare("--tasks", "3", "--task", str(share))["done"] == list(range(share, num_tasks, 3))
    slurm.clear()
    assert prepare("--slurm", "site.yaml", "--tasks", "3")["jobs"] == ["1"]
    assert slurm == [("sbatch", "--parsable", f"{folder}/merge.sh")]
    run_script("merge.sh")
    assert not folder.exists()
    manifest = load_manifest("my out")
    assert (manifest.seed, manifest.holdout, manifest.parse_special) == (7, 0.25, True)
    assert manifest.sources[0].path == SOURCE
    prepare("--out", "alone")
    assert files_of(Path("my out")) == files_of(Path("alone"))


def test_a_merge_that_slurm_refuses_takes_the_array_back(
    slurm: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*command: str, check: bool = True) -> str:
        slurm.append(command)
        if command[-1].endswith("merge.sh"):
            raise ValueError("sbatch refuses: no more jobs")
        return "5\n"

    monkeypatch.setattr(submit, "slurm", refuse)
    with pytest.raises(ValueError, match="no more jobs"):
        prepare("--slurm", "site.yaml", "--tasks", "3")
    assert slurm[-1] == ("scancel", "5")


@pytest.mark.parametrize(
    "options", [("--tasks", "3"), ("--task", "0"), ("--slurm", "site.yaml"), ("--tasks=3", "--task=0", "--slurm=a")]
)
def test_what_does_not_go_together(options: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="give --tasks together with --task, to do one share, or with --slurm"):
        prepare(*options)
    assert not Path("my out.tasks").exists()
