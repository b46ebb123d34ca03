"""Runs on the SLURM of the tests: real text, a real small recipe, and jobs of small ranks."""

from __future__ import annotations

import json
import pydoc_data.topics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import yaml

from bd3_scale.launch.job import Job, new_submission, script, supervision
from bd3_scale.launch.submit import make_job
from tools.fault_campaign import RECIPE as CAMPAIGN

BD3_SCALE = Path(sys.executable).with_name("bd3-scale")
SMALL_RANK = Path(__file__).with_name("small_rank.py")
STEPS = 30
RECIPE = {
    "name": "tiny",
    "model": CAMPAIGN["model"],
    "diffusion": {"block_size": 8, "mask_rate_low": 0.3, "mask_rate_high": 0.8},
    "data": {"path": "data", "seq_len": 64, "num_workers": 0},
    "optimizer": {"lr": 1e-3, "ema_decay": 0.9, "eps": 1e-4},
    "train": {"steps": STEPS, "global_batch_size": 64, "micro_batch_size": 4, "precision": "fp32"},
    "parallel": {"tensor": 2},
    "evaluation": {"every_steps": 0, "sequences": 8},
    "checkpoint": {"every_steps": 10, "keep_last": 3},
    "logging": {"wandb": {"mode": "disabled"}},
}
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


def write_workplace(folder: Path) -> None:
    for name, text in list(pydoc_data.topics.topics.items())[:24]:
        (folder / f"{name.replace('/', '-')}.txt").write_text(text)
    command = ["data", "prepare", ".", "--out", "data", "--tokenizer", "bytes", "--seq-len", "64", "--holdout", "0.1"]
    subprocess.run([BD3_SCALE, *command], cwd=folder, check=True, capture_output=True, timeout=60)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "site.yaml").write_text(yaml.safe_dump(PROFILE))


def small_job(folder: Path, run: str, *arguments: object, nodes: int = 2, chain: int = 0, **profile: object) -> Job:
    """A job whose ranks are `small_rank.py` with `arguments`, on a site that differs from PROFILE by `profile`."""
    site = folder / f"{run}.site.yaml"
    site.write_text(yaml.safe_dump({**PROFILE, "processes_per_node": 1, **profile}))
    overrides = [f"run_dir={folder / run}", "parallel.tensor=1"]
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
    """What supervisors and ranks said, for the message of a failed test."""
    return "\n".join(f"== {path}\n{path.read_text()[-1500:]}" for path in sorted(run.rglob("*.log")))


def losses(run: Path) -> dict[int, tuple[float, float]]:
    path = run / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []
    return {r["step"]: (r["train_loss"], r["grad_norm"]) for r in records if "train_loss" in r}
