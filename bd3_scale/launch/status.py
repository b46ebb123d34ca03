"""Read the status of a submitted run from its files, squeue and, if there is accounting, sacct."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bd3_scale.launch.attempts import read_attempts
from bd3_scale.launch.records import read_json
from bd3_scale.launch.submit import SUBMITTED, active_jobs, close_run, slurm_folder
from bd3_scale.observe.metrics import METRICS_FILE, read_metrics
from bd3_scale.observe.report_data import last_value, remaining_seconds, step_seconds, total_seconds
from bd3_scale.resilience.readers import reader


@dataclass(frozen=True)
class RunStatus:
    """The present state of a run. Times in seconds.

    goodput: the share of the attempts' total wall time in which steps were taken; a step that was taken twice counts
        once. None before the first step.
    """

    run_dir: str
    state: str
    jobs: dict[str, str]
    step: int
    steps: int
    saved: int
    tokens_per_second: float | None
    goodput: float | None
    eta_seconds: float | None
    attempts: list[dict[str, Any]]
    ranks: dict[str, int]


@reader("a run", path="run_dir")
def read_status(run_dir: Path) -> RunStatus:
    """Return the status of a run; also record the end of an attempt whose supervisor could not.

    ValueError: the run was not submitted, or SLURM does not answer.
    """
    folder = slurm_folder(run_dir)
    jobs = active_jobs(run_dir)
    if not jobs:
        close_run(run_dir)
    job, attempts, current = read_json(folder / "job.json"), read_attempts(folder), read_json(folder / "current.json")
    beats = [read_json(path) for path in (folder / "heartbeats").glob("rank*.json")] if current else []
    phases = [beat["phase"] for beat in beats if beat]
    steps = [beat["step"] for beat in beats if beat] or [a["step"] for a in attempts[-1:]]
    records = read_metrics(run_dir / METRICS_FILE)
    spans = step_seconds(records, job["steps"])
    step = min(steps, default=0)
    wall = sum(a["ended"] - a["started"] for a in attempts) + (time.time() - current["started"] if current else 0.0)
    useful = total_seconds(spans, step)
    return RunStatus(
        run_dir=str(run_dir),
        state=_state(jobs, [a for a in attempts if a["submission"] == job["submission"]], bool(current), folder),
        jobs=jobs,
        step=step,
        steps=job["steps"],
        saved=max([beat["saved"] for beat in beats if beat] or [a["saved"] for a in attempts[-1:]], default=0),
        tokens_per_second=last_value(records, "perf/tokens_per_second"),
        goodput=useful / wall if useful and wall else None,
        eta_seconds=remaining_seconds(spans, job["steps"] - step),
        attempts=attempts,
        ranks={phase: phases.count(phase) for phase in sorted(set(phases))},
    )


def _state(jobs: dict[str, str], attempts: list[dict[str, Any]], current: bool, folder: Path) -> str:
    if "RUNNING" in jobs.values():
        return "running" if current else "starting"
    if jobs:
        return next(iter(jobs.values())).lower()
    if attempts and not current:
        return str(attempts[-1]["outcome"])
    known = read_json(folder / SUBMITTED).get("jobs", [])
    return f"ended without a record, and SLURM no longer knows job {known[-1]}" if known else "not submitted"


def newest_logs(run_dir: Path, rank: int | None, attempt: int | None) -> Path:
    """Return the log of a rank, or of the supervisor if `rank` is None; by default of the newest attempt.

    FileNotFoundError: there is no such log.
    """
    logs = run_dir / "logs"
    if rank is None:
        paths = sorted(logs.glob("job-*.log"), key=lambda path: path.stat().st_mtime)
    else:
        wanted = f"attempt-{'*' if attempt is None else attempt}"
        paths = sorted(logs.glob(f"{wanted}/rank{rank}.log"), key=lambda path: int(path.parent.name.split("-")[1]))
    if not paths:
        raise FileNotFoundError(f"no such log in {logs} yet; `bd3-scale status {run_dir}` shows the state of the run")
    return paths[-1]


def as_json(status: RunStatus) -> str:
    return json.dumps(status.__dict__)
