"""Submitting a run, and what a person may do with it afterwards."""

from __future__ import annotations

import hashlib
import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bd3_scale.launch.job import SLURM_FOLDER, Job, check_job, new_submission, script, supervision
from bd3_scale.launch.profile import load_profile
from bd3_scale.launch.records import excluded_nodes, read_json
from bd3_scale.launch.slurm import ACTIVE, job_states, partitions, slurm
from bd3_scale.recipe.load import load_recipe, recipe_files, resolved_yaml
from bd3_scale.resilience.files import check_writable, write_atomically
from bd3_scale.resilience.runlock import lock_run

SUBMITTED = "submitted.json"


def make_job(
    recipe: Path,
    overrides: Sequence[str],
    *,
    profile: str,
    nodes: int,
    time_limit: str | None = None,
    chain: int = 0,
    dependency: str | None = None,
    exclude: Sequence[str] = (),
) -> Job:
    """The job of a recipe on a site, checked.

    Raises:
        ValueError: recipe, profile and nodes do not fit together.
    """
    loaded, site = load_recipe(recipe, overrides), load_profile(profile)
    if time_limit is not None:
        site = type(site).model_validate(site.model_dump() | {"time_limit": time_limit})
    run_dir = loaded.run_path.absolute()
    check_job(loaded, site, nodes, None, run_dir)
    absolute = {"path": str(Path(loaded.data.path).absolute())}
    if loaded.data.remote is not None and "://" not in loaded.data.remote:
        absolute["remote"] = str(Path(loaded.data.remote).absolute())
    stored = loaded.model_copy(
        update={"run_dir": str(run_dir), "data": loaded.data.model_copy(update=absolute)}
        | ({"init_from": str(Path(loaded.init_from).absolute())} if loaded.init_from else {})
    )
    return Job(
        recipe=stored,
        profile=site,
        nodes=nodes,
        folder=run_dir / SLURM_FOLDER,
        recipe_files={str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in recipe_files(recipe)},
        commit=source_commit(),
        chain=chain,
        dependency=dependency,
        exclude=tuple(exclude),
    )


def source_commit() -> str:
    """The commit of this code, with `+` where files differ from it; `unknown` where it is no git checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + "+" * bool(changed.stdout.strip())


def ask_slurm(job: Job) -> str:
    """What `sbatch --test-only` says of the job: when and where it would start. ValueError: it would not."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script(job))
        file.flush()
        # It answers on stderr, whatever the answer.
        slurm("sbatch", "--version")
        done = subprocess.run(
            ["sbatch", "--test-only", file.name], capture_output=True, text=True, timeout=60, check=False
        )
    if done.returncode:
        raise ValueError(_refusal(job, done.stderr.strip()))
    return done.stderr.strip()


def submit(job: Job) -> list[str]:
    """Stores recipe, script and supervision in the run directory and submits; gives the ids of the jobs.

    Raises:
        ValueError: a job of this run is queued or running already, or SLURM refuses.
    """
    slurm("sbatch", "--version")
    check_writable(job.folder)
    (job.run_dir / "logs").mkdir(exist_ok=True)
    with lock_run(job.folder):
        refuse_second(job.run_dir)
        job = replace(job, submission=new_submission())
        ask_slurm(job)
        write_atomically(job.folder / "recipe.yaml", resolved_yaml(job.recipe))
        write_atomically(job.folder / "job.sh", script(job))
        write_atomically(job.folder / "job.json", json.dumps(supervision(job), indent=1))
        return _sbatch(job.run_dir, max(1, job.chain))


def submit_again(run_dir: Path) -> list[str]:
    """Submits the stored job of a run that has ended. ValueError as `submit`, or the run was never submitted."""
    folder = stored(run_dir)
    with lock_run(folder):
        refuse_second(run_dir)
        job = read_json(folder / "job.json") | {"submission": new_submission()}
        write_atomically(folder / "job.json", json.dumps(job, indent=1))
        return _sbatch(run_dir, max(1, job["chain"]))


def _sbatch(run_dir: Path, count: int) -> list[str]:
    folder = run_dir / SLURM_FOLDER
    (folder / "stop").unlink(missing_ok=True)
    exclude = [f"--exclude={names}"] if (names := excluded_nodes(folder)) else []
    jobs = [
        slurm("sbatch", "--parsable", *exclude, str(folder / "job.sh")).strip().partition(";")[0] for _ in range(count)
    ]
    write_atomically(folder / SUBMITTED, json.dumps({"jobs": jobs}))
    return jobs


def _refusal(job: Job, said: str) -> str:
    known = f"; partitions here: {partitions()}" if "partition" in said.lower() else ""
    return f"SLURM refuses the job: {said}{known}. Change the profile, or --nodes and --time"


def stored(run_dir: Path) -> Path:
    """The folder of a submitted run. ValueError: it was not submitted."""
    folder = run_dir.absolute() / SLURM_FOLDER
    if not (folder / "job.json").exists():
        raise ValueError(
            f"{run_dir} was not submitted to SLURM: `bd3-scale submit RECIPE --profile … run_dir={run_dir}`"
        )
    return folder


def active_jobs(run_dir: Path) -> dict[str, str]:
    """Jobs of a run that are queued or running, with their states."""
    jobs = read_json(run_dir.absolute() / SLURM_FOLDER / SUBMITTED).get("jobs", [])
    return {job: state for job, state in job_states(jobs).items() if state in ACTIVE}


def refuse_second(run_dir: Path) -> None:
    """ValueError where a job of the run is queued or running."""
    if active := active_jobs(run_dir):
        shown = ", ".join(f"{job} ({state.lower()})" for job, state in active.items())
        raise ValueError(
            f"{run_dir} has a job already: {shown}. `bd3-scale stop {run_dir}` ends it; or choose another run_dir"
        )


def stop(run_dir: Path, *, now: bool = False) -> dict[str, str]:
    """Ends the jobs of a run for good: running ones save first, unless `now`. Gives what was done to each job."""
    folder, done = stored(run_dir), {}
    (folder / "stop").touch()
    for job, state in active_jobs(run_dir).items():
        if state == "RUNNING" and not now:
            slurm("scancel", "--batch", "--signal=USR1", job)
            done[job] = "saves and stops"
        else:
            slurm("scancel", job)
            done[job] = "cancelled"
    return done


def requeue(run_dir: Path) -> str:
    """Sends a running job back into the queue after it has saved; an ended run is submitted again as it was stored."""
    stored(run_dir)
    active = active_jobs(run_dir)
    if running := [job for job, state in active.items() if state == "RUNNING"]:
        slurm("scancel", "--batch", "--signal=USR1", running[0])
        return f"job {running[0]} saves and goes back into the queue"
    if active:
        return f"job {next(iter(active))} is in the queue already"
    return f"submitted again as job {', '.join(submit_again(run_dir))}"
