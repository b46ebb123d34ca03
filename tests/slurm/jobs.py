"""Submit runs to the SLURM of the tests: real text with a small recipe, and jobs of small ranks."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import yaml

from bd3_scale.launch.job import Job, new_submission, script, supervision
from bd3_scale.launch.submit import make_job
from tests.support.recipes import write_recipe

SMALL_RANK = Path(__file__).with_name("small_rank.py")
STEPS = 100
PROFILE = {
    "partition": "main",
    "processes_per_node": 2,
    "memory": "2G",
    "time_limit": "10:00",
    "warning_seconds": 60,
    "interface": "lo",
    "environment": {"DS_ACCELERATOR": "cpu"},
    "deadlines": {"start": 120, "step": 20, "checkpoint": 60, "evaluation": 60},
}


def write_workplace(folder: Path, data: Path) -> None:
    shutil.copytree(data, folder / "data")
    write_recipe(
        folder / "recipe.yaml",
        optimizer={"eps": 1e-4},
        train={"steps": STEPS, "global_batch_size": 16, "micro_batch_size": 4},
        parallel={"tensor": 2},
        evaluation={"every_steps": 0, "sequences": 8},
        checkpoint={"every_steps": 10, "keep_last": 3},
    )
    (folder / "site.yaml").write_text(yaml.safe_dump(PROFILE))


def small_job(folder: Path, run: str, *arguments: object, nodes: int = 2, chain: int = 0, **profile: object) -> Job:
    """Return a job whose ranks are `small_rank.py` with `arguments`, on PROFILE changed by `profile`."""
    site = folder / f"{run}.site.yaml"
    site.write_text(yaml.safe_dump({**PROFILE, "processes_per_node": 1, **profile}))
    overrides = [f"run_dir={json.dumps(str(folder / run))}", "parallel.tensor=1"]
    job = make_job(folder / "recipe.yaml", overrides, profile=str(site), nodes=nodes, chain=chain)
    job = replace(job, submission=new_submission())
    command = [sys.executable, str(SMALL_RANK), str(job.run_dir), *map(str, arguments)]
    job.folder.mkdir(parents=True)
    (job.run_dir / "logs").mkdir()
    (job.folder / "job.json").write_text(json.dumps(supervision(job) | {"command": command}))
    (job.folder / "job.sh").write_text(script(job))
    return job


def attempts(run: Path) -> list[dict]:
    path = run / "slurm" / "attempts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def logs(run: Path) -> str:
    """Return the output of supervisors and ranks, for the message of a failed test."""
    return "\n".join(f"== {path}\n{path.read_text()[-1500:]}" for path in sorted(run.rglob("*.log")))
