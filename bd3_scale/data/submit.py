"""Prepare data with SLURM: an array of jobs, each of which does its share of the tasks, and one job that merges."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from bd3_scale.data.prepare import Preparation
from bd3_scale.launch.job import batch_script, check_folder, container_options, node_directives, site_environment
from bd3_scale.launch.profile import Profile, load_profile
from bd3_scale.launch.records import escape_pattern, read_json
from bd3_scale.launch.slurm import ACTIVE, job_states, slurm
from bd3_scale.launch.submit import SUBMITTED, ask_slurm, plugin_path
from bd3_scale.resilience.files import write_atomically

_PROGRAM = "import sys; from bd3_scale.cli import main; sys.exit(main())"


def submit(
    preparation: Preparation, arguments: Sequence[str], *, profile: str, shares: int, plugins: Sequence[str]
) -> list[str]:
    """Submit the unfinished shares, and a job that merges after they succeeded; return the ids of the jobs.

    arguments: those of `bd3-scale data prepare`, without the options of sharing; paths are relative to the current
    folder. Raises ValueError: such jobs are queued or running, other nodes would not see the folder, or SLURM refuses.
    """
    folder = preparation.folder.absolute()
    loaded = load_profile(profile)
    check_folder(folder, loaded, "--out")
    _check_not_active(folder)
    site = _whole_node_without_gpus(loaded)
    python = site.container.python if site.container else sys.executable
    command = [python, "-c", _PROGRAM, *(f"--plugin={name}" for name in plugins), "data", "prepare", *arguments]
    if not any(word.startswith("--workers=") for word in arguments):
        command.append(f"--workers={site.cpus_per_process}")
    missing = preparation.shares_missing(shares)
    scripts = {"merge": _script(site, folder, command, plugins)}
    if missing:
        scripts["array"] = _script(site, folder, [*command, f"--tasks={shares}"], plugins, missing)
    for script in scripts.values():
        ask_slurm(script)
    preparation.store_plan()
    (folder / "logs").mkdir(exist_ok=True)
    for name, script in scripts.items():
        write_atomically(folder / f"{name}.sh", script)
    return _sbatch(folder, with_array=bool(missing))


def _sbatch(folder: Path, with_array: bool) -> list[str]:
    """Submit both jobs or none; return their ids."""
    jobs: list[str] = []
    try:
        if with_array:
            jobs.append(_job_id(slurm("sbatch", "--parsable", str(folder / "array.sh"))))
        # If a job of the array fails, the merge can never start; --kill-on-invalid-dep cancels it.
        after = [f"--dependency=afterok:{jobs[0]}", "--kill-on-invalid-dep=yes"] if jobs else []
        jobs.append(_job_id(slurm("sbatch", "--parsable", *after, str(folder / "merge.sh"))))
        write_atomically(folder / SUBMITTED, json.dumps({"jobs": jobs}))
    except BaseException:
        if jobs:
            slurm("scancel", *jobs, check=False)
        raise
    return jobs


def _job_id(output: str) -> str:
    return output.strip().partition(";")[0]


def _check_not_active(folder: Path) -> None:
    states = job_states(read_json(folder / SUBMITTED).get("jobs", []))
    if active := [job for job, state in states.items() if state in ACTIVE]:
        raise ValueError(
            f"{folder} has jobs already: {', '.join(active)}; wait for them (squeue), or end them with scancel"
        )


def _whole_node_without_gpus(profile: Profile) -> Profile:
    """Return the site for one process with all cores of a node's ranks, without GPUs."""
    cores = profile.processes * profile.cpus_per_process
    return profile.model_copy(update={"gpus_per_node": 0, "processes_per_node": 1, "cpus_per_process": cores})


def _script(
    site: Profile, folder: Path, command: Sequence[str], plugins: Sequence[str], shares: Sequence[int] = ()
) -> str:
    run = ["srun", "--ntasks=1", f"--cpus-per-task={site.cpus_per_process}", *container_options(site)]
    if shares:
        run += ["bash", "-c", 'exec "$@" --task="$SLURM_ARRAY_TASK_ID"', "prepare"]
    environment = site_environment(site, plugin_path(plugins))
    return batch_script(
        site, _directives(site, folder, shares), f"fills {folder.name!a}", environment, [*run, *command]
    )


def _directives(site: Profile, folder: Path, shares: Sequence[int]) -> Iterator[str]:
    yield f"job-name=prepare-{folder.stem}"
    yield from node_directives(site, 1)
    if site.exclusive:
        yield "exclusive"
    yield f"time={site.time_limit}"
    yield "requeue" if site.requeue else "no-requeue"
    yield "open-mode=append"
    yield f"chdir={os.getcwd()}"
    yield f"output={escape_pattern(folder)}/logs/{'%A_%a' if shares else 'merge-%j'}.log"
    if shares:
        yield f"array={_ranges(shares)}"


def _ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers in sbatch's format, such as 0-3,7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
