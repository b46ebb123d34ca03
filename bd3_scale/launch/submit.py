"""Submit a run to SLURM, and stop, requeue or resubmit it afterwards."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from bd3_scale.launch.attempts import record_ended_job
from bd3_scale.launch.job import SLURM_FOLDER, Job, check_job, new_submission, script, supervision
from bd3_scale.launch.profile import TIME_LIMIT, load_profile
from bd3_scale.launch.records import excluded_nodes, read_json
from bd3_scale.launch.slurm import ACTIVE, job_states, partitions, run_command, slurm
from bd3_scale.observe.environment import source_commit
from bd3_scale.recipe.load import load_recipe, recipe_files, resolved_yaml, with_plugins
from bd3_scale.recipe.schema import DataRecipe, DataSource
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
    plugins: Sequence[str] = (),
) -> Job:
    """Return the checked job of a recipe on a site. `plugins` of the command line are added to the recipe's.

    Raises:
        ValueError: recipe, profile and nodes do not fit together.
    """
    loaded, site = with_plugins(load_recipe(recipe, overrides), plugins), load_profile(profile)
    if time_limit is not None:
        if not re.fullmatch(TIME_LIMIT, time_limit, re.ASCII):
            raise ValueError(f"--time must be minutes, or in a form such as 4:00:00 or 1-00:00:00, not {time_limit!a}")
        site = site.model_copy(update={"time_limit": time_limit})
    run_dir = loaded.run_path.absolute()
    check_job(loaded, site, nodes, run_dir)
    resolved = loaded.model_copy(
        update={"run_dir": str(run_dir), "data": _absolute(loaded.data)}
        | ({"init_from": str(Path(loaded.init_from).absolute())} if loaded.init_from else {})
    )
    return Job(
        recipe=resolved,
        profile=site,
        nodes=nodes,
        folder=run_dir / SLURM_FOLDER,
        recipe_files={str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in recipe_files(recipe)},
        commit=source_commit(),
        chain=chain,
        dependency=dependency,
        exclude=tuple(exclude),
        python_path=plugin_path(resolved.plugins),
    )


def _absolute(data: DataRecipe) -> DataRecipe:
    """Return the data with absolute folders: the job runs in another directory."""

    def absolute_paths(place: DataRecipe | DataSource) -> dict[str, str]:
        absolute = {"path": str(Path(place.path).absolute())}
        if place.remote is not None and "://" not in place.remote:
            absolute["remote"] = str(Path(place.remote).absolute())
        return absolute

    if data.sources:
        return data.model_copy(
            update={"sources": tuple(source.model_copy(update=absolute_paths(source)) for source in data.sources)}
        )
    return data.model_copy(update=absolute_paths(data))


def plugin_path(plugins: Sequence[str]) -> str:
    """Return the absolute folders of PYTHONPATH, in which the job finds the same plug-ins; empty without plug-ins."""
    if not plugins:
        return ""
    folders = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return os.pathsep.join(str(Path(folder).absolute()) for folder in folders)


def ask_slurm(batch_script: str) -> str:
    """Return the answer of `sbatch --test-only` to a script: when and where it would start. ValueError: a refusal."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(batch_script)
        file.flush()
        done = run_command("sbatch", "--test-only", file.name)  # answers on stderr, also on success
    if done.returncode:
        raise ValueError(_refusal(" ".join(done.stderr.split())))
    return done.stderr.strip()


def submit(job: Job) -> list[str]:
    """Store recipe, script and supervision in the run directory and submit; return the ids of the jobs.

    Raises:
        ValueError: a job of this run is queued or running already, or SLURM refuses.
    """
    ask_slurm(script(job))
    with _no_new_folders_if_refused(job.run_dir):
        (job.run_dir / "logs").mkdir(parents=True, exist_ok=True)
        check_writable(job.folder)
        job.folder.chmod(0o700)  # it holds the secret by which the ranks authenticate each other
        with lock_run(job.folder):
            check_not_active(job.run_dir)
            _record_ended_job(job.folder)
            job = replace(job, submission=new_submission())
            write_atomically(job.folder / "recipe.yaml", resolved_yaml(job.recipe))
            write_atomically(job.folder / "job.sh", script(job))
            write_atomically(job.folder / "job.json", json.dumps(supervision(job), indent=1))
            return _sbatch(job.run_dir, max(1, job.chain))


@contextmanager
def _no_new_folders_if_refused(run_dir: Path) -> Iterator[None]:
    """Remove the folders of a run that did not exist before, and new parents, if the block raises."""
    made = [path for path in (run_dir / "logs", run_dir / SLURM_FOLDER, run_dir, *run_dir.parents) if not path.exists()]
    try:
        yield
    except (OSError, ValueError):
        for path in made:
            if path.name == SLURM_FOLDER and path.parent == run_dir:
                shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):  # not empty: another process has begun to use it
                path.rmdir()
        raise


def _record_ended_job(folder: Path) -> None:
    record_ended_job(folder, read_json(folder / SUBMITTED).get("jobs", []))


def resubmit(run_dir: Path) -> list[str]:
    """Submit the stored job of an ended run again. ValueError as `submit`, or the run was never submitted."""
    folder = slurm_folder(run_dir)
    folder.chmod(0o700)
    with lock_run(folder):
        check_not_active(run_dir)
        _record_ended_job(folder)
        job = read_json(folder / "job.json") | {"submission": new_submission()}
        write_atomically(folder / "job.json", json.dumps(job, indent=1))
        return _sbatch(run_dir, max(1, job["chain"]))


def close_run(run_dir: Path) -> None:
    """Record how a run without an active job ended, if its supervisor could not and SLURM knows it."""
    folder = slurm_folder(run_dir)
    with contextlib.suppress(OSError, ValueError), lock_run(folder):  # another user's run, or one being submitted
        if not active_jobs(run_dir):
            _record_ended_job(folder)


def _sbatch(run_dir: Path, count: int) -> list[str]:
    """Submit all jobs or none: if SLURM refuses one, those before it are cancelled. Return their ids."""
    folder = run_dir / SLURM_FOLDER
    (folder / "stop").unlink(missing_ok=True)
    exclude = [f"--exclude={names}"] if (names := excluded_nodes(folder)) else []
    # Held until SLURM has accepted all of them: the first must not start if a later one is refused.
    hold = ["--hold"] if count > 1 else []
    jobs: list[str] = []
    try:
        for _ in range(count):
            output = slurm("sbatch", "--parsable", *hold, *exclude, str(folder / "job.sh"))
            jobs.append(output.strip().partition(";")[0])
        write_atomically(folder / SUBMITTED, json.dumps({"jobs": jobs}))
        if hold:
            slurm("scontrol", "release", ",".join(jobs))
    except BaseException:
        if jobs:
            slurm("scancel", *jobs, check=False)
        raise
    return jobs


def _refusal(message: str) -> str:
    known = f"; partitions here: {partitions()}" if "partition" in message.lower() else ""
    return f"SLURM refuses the job: {message}{known}. Change the profile, or --nodes and --time"


def slurm_folder(run_dir: Path) -> Path:
    """Return the folder of a submitted run. ValueError: it was not submitted."""
    folder = run_dir.absolute() / SLURM_FOLDER
    if not (folder / "job.json").exists():
        raise ValueError(
            f"{run_dir} was not submitted to SLURM: `bd3-scale submit RECIPE --profile … run_dir={run_dir}`"
        )
    return folder


def active_jobs(run_dir: Path) -> dict[str, str]:
    """Return the jobs of a run that are queued or running, with their states."""
    jobs = read_json(run_dir.absolute() / SLURM_FOLDER / SUBMITTED).get("jobs", [])
    return {job: state for job, state in job_states(jobs).items() if state in ACTIVE}


def check_not_active(run_dir: Path) -> None:
    """Raise ValueError if a job of the run is queued or running."""
    if active := active_jobs(run_dir):
        shown = ", ".join(f"{job} ({state.lower()})" for job, state in active.items())
        raise ValueError(
            f"{run_dir} has a job already: {shown}. `bd3-scale stop {run_dir}` ends it; or choose another run_dir"
        )


def stop(run_dir: Path, *, now: bool = False) -> dict[str, str]:
    """Stop the jobs of a run: running ones save first, unless `now`. Return what was done to each job."""
    folder, done = slurm_folder(run_dir), {}
    (folder / "stop").touch()
    for job, state in active_jobs(run_dir).items():
        if state == "RUNNING" and not now:
            # --batch: to the supervisor alone, which asks the ranks to save; a signal to the steps could kill ranks
            # that cannot handle it yet.
            slurm("scancel", "--batch", "--signal=USR1", job)
            done[job] = "saves and stops"
        else:
            slurm("scancel", job)
            done[job] = "cancelled"
    close_run(run_dir)
    return done


def requeue(run_dir: Path) -> str:
    """Let a running job save and requeue itself, or submit an ended run again. Return what was done, in words."""
    slurm_folder(run_dir)
    active = active_jobs(run_dir)
    if running := [job for job, state in active.items() if state == "RUNNING"]:
        slurm("scancel", "--batch", "--signal=USR1", running[0])
        return f"job {running[0]} saves and goes back into the queue"
    if active:
        return f"job {next(iter(active))} is in the queue already"
    return f"submitted again as job {', '.join(resubmit(run_dir))}"
