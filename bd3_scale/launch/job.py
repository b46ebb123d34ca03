"""Make a job from a recipe and a site: the batch script and the supervisor's settings, as plain values."""

from __future__ import annotations

import hashlib
import re
import secrets
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bd3_scale.launch import supervise
from bd3_scale.launch.profile import Profile
from bd3_scale.launch.records import CACHE_OVERRIDE, escape_pattern
from bd3_scale.recipe.checks import check_recipe
from bd3_scale.recipe.data_rules import deadline_problem
from bd3_scale.recipe.schema import Recipe, RecipeError, without_controls

SLURM_FOLDER = "slurm"
_PLAIN = re.compile(r"[\w@%+=:,./\[\]-]*", re.ASCII)


@dataclass(frozen=True)
class Job:
    """A run on a site. Paths are absolute. `script` and `supervision` depend on nothing else.

    python_path: the folders of its plug-ins, for PYTHONPATH: a resubmission may come from another shell.
    """

    recipe: Recipe
    profile: Profile
    nodes: int
    folder: Path
    recipe_files: dict[str, str]
    commit: str
    python: str = sys.executable
    supervisor: str = supervise.__file__
    python_path: str = ""
    submission: str = ""
    chain: int = 0
    dependency: str | None = None
    exclude: tuple[str, ...] = ()

    @property
    def run_dir(self) -> Path:
        return self.folder.parent

    @property
    def name(self) -> str:
        """Return a name that is unique to the run directory: `--dependency=singleton` serialises jobs of one name."""
        return f"{self.recipe.name}-{hashlib.sha256(str(self.run_dir).encode()).hexdigest()[:6]}"


def new_submission() -> str:
    """Return a new id; by it the supervisor recognises the jobs that were submitted together."""
    return secrets.token_hex(4)


def check_job(recipe: Recipe, profile: Profile, nodes: int, run_dir: Path) -> None:
    """Check that recipe, site and nodes fit together.

    Raises:
        RecipeError: they do not; the message suggests layouts and node counts. ValueError: other nodes would not see
        the run directory, or SLURM cannot write its logs there.
    """
    world = nodes * profile.processes
    try:
        check_recipe(recipe, world)
    except RecipeError as error:
        alternatives = list(_alternatives(recipe, profile, nodes))
        hint = f"these would fit: {'; '.join(alternatives[:6])}" if alternatives else "no other layout would fit"
        counted = f"{nodes} nodes x {profile.processes} processes = {world} ranks"
        raise RecipeError([*error.problems, f"{counted}; {hint}"]) from None
    if problem := deadline_problem(recipe.data, profile.deadlines, "the profile's deadlines"):
        raise RecipeError([problem])
    check_folder(run_dir, profile, "run_dir")


def check_folder(folder: Path, profile: Profile, name: str) -> None:
    """Raise ValueError if other nodes would not see `folder`, an option `name`, or SLURM cannot write logs there."""
    shared = [Path(root) for root in profile.shared_storage]
    if shared and not any(folder.is_relative_to(root) for root in shared):
        raise ValueError(
            f"{name} {folder} is not on shared storage ({', '.join(map(str, shared))} in the profile): other nodes "
            f"would not see it; set {name}{' ' if name.startswith('--') else '='}FOLDER there"
        )
    if "\\" in str(folder):
        raise ValueError(
            f"{name} {folder} holds a backslash, which SLURM removes from the file names of logs: choose another"
        )


def _alternatives(recipe: Recipe, profile: Profile, nodes: int) -> Iterator[str]:
    """Yield options that would fit: other layouts on these nodes, then this layout on other numbers of nodes."""
    for tensor in (1, 2, 4, 8):
        for pipeline in (1, 2, 4, 8):
            split = {"tensor": tensor, "pipeline": pipeline, "layers_per_chunk": None, "virtual_pipeline": 1}
            split["sequence"] = recipe.parallel.sequence and tensor > 1
            other = recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update=split)})
            if tensor <= profile.processes and _fits(other, nodes * profile.processes):
                yield f"parallel.tensor={tensor} parallel.pipeline={pipeline}"
    for count in range(1, 2 * nodes + 1):
        if count != nodes and _fits(recipe, count * profile.processes):
            yield f"--nodes {count}"


def _fits(recipe: Recipe, world_size: int) -> bool:
    try:
        check_recipe(recipe, world_size)
    except RecipeError:
        return False
    return True


def script(job: Job) -> str:
    """Return the batch script, a pure function of the job."""
    comment = f"{job.recipe.name}, bd3_scale at commit {job.commit}; job.json in this folder has the details."
    command = [job.python, "-u", job.supervisor, "keep", str(job.folder / "job.json")]
    return batch_script(job.profile, _directives(job), comment, site_environment(job.profile, job.python_path), command)


def batch_script(
    profile: Profile,
    directives: Iterable[str],
    comment: str,
    environment: Iterable[tuple[str, str]],
    command: Sequence[str],
) -> str:
    """Return a batch script that runs `command` with the modules of a site.

    ValueError: a directive holds a control character, see `_quoted`.
    """
    lines = ["#!/bin/bash", *(f"#SBATCH --{_quoted(directive)}" for directive in directives), "", f"# {comment}", ""]
    lines += ["set -eo pipefail"]
    lines += [f"module load {shlex.join(profile.modules)}"] if profile.modules else []
    lines += [f"export {name}={shlex.quote(value)}" for name, value in environment]
    # `exec`: the command replaces the shell, because SLURM sends the signal of `--signal=B:` to the batch shell alone,
    # and bash would not pass it on while it waits for a command.
    return "\n".join([*lines, f"exec {shlex.join(command)}", ""])


def _quoted(directive: str) -> str:
    """Return a directive as sbatch reads it: in double quotes if needed, with quotes and backslashes escaped.

    See `_get_argument` of sbatch/opt.c in SLURM 22.05. ValueError: a value holds a control character; a newline would
    begin a new line of the script.
    """
    name, equals, value = directive.partition("=")
    if _PLAIN.fullmatch(value):
        return directive
    try:
        without_controls(value)
    except ValueError as error:
        raise ValueError(f"sbatch's --{name} {error}, not {value!a}") from None
    escaped = re.sub(r'(["\\])', r"\\\1", value)
    return f'{name}{equals}"{escaped}"'


def _directives(job: Job) -> Iterator[str]:
    profile = job.profile
    yield f"job-name={job.name}"
    yield from node_directives(profile, job.nodes)
    optional = {"exclude": ",".join(job.exclude) or None, "dependency": _dependency(job)}
    yield from (f"{name}={value}" for name, value in optional.items() if value is not None)
    if profile.exclusive:
        yield "exclusive"
    yield f"time={profile.time_limit}"
    # B: to the batch shell alone, which the supervisor has replaced; it passes the signal on when ranks can handle it.
    yield f"signal=B:USR1@{profile.warning_seconds}"
    yield "requeue" if profile.requeue and not job.chain else "no-requeue"
    yield "open-mode=append"
    yield f"output={escape_pattern(job.run_dir)}/logs/job-%j.log"


def node_directives(profile: Profile, nodes: int) -> Iterator[str]:
    """Yield the directives of a site's nodes and of the account that requests them."""
    yield f"nodes={nodes}"
    yield f"ntasks-per-node={profile.processes}"
    yield f"cpus-per-task={profile.cpus_per_process}"
    if profile.gpus_per_node:
        yield f"gpus-per-node={profile.gpus_per_node}"
    optional = {"mem": profile.memory, "partition": profile.partition, "account": profile.account}
    optional |= {"qos": profile.qos, "constraint": profile.constraint}
    yield from (f"{name}={value}" for name, value in optional.items() if value is not None)


def _dependency(job: Job) -> str | None:
    wanted = [*([job.dependency] if job.dependency else []), *(["singleton"] if job.chain else [])]
    return ",".join(wanted) or None


def site_environment(profile: Profile, python_path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the environment variables of every process of a job on a site."""
    yield "OMP_NUM_THREADS", str(profile.cpus_per_process)
    yield "PYTHONSAFEPATH", "1"  # ranks must not import modules from the folder of the submission
    if python_path:
        yield "PYTHONPATH", python_path
    if profile.interface is not None:
        yield "GLOO_SOCKET_IFNAME", profile.interface
        yield "NCCL_SOCKET_IFNAME", profile.interface
    yield from profile.environment.items()


def supervision(job: Job) -> dict[str, Any]:
    """Return the content of job.json, which `launch.supervise` reads; it depends on the job alone."""
    profile = job.profile
    python = profile.container.python if profile.container else job.python
    data = job.recipe.data
    caches = bool(data.remotes) and profile.scratch is not None
    sources = [source.model_dump(mode="json") for source in data.sources] if caches else []
    command = [python, "-m", "bd3_scale.train", str(job.folder / "recipe.yaml")]
    return {
        "name": job.name,
        "submission": job.submission,
        "run_dir": str(job.run_dir),
        "commit": job.commit,
        "recipe_files": job.recipe_files,
        "nodes": job.nodes,
        "ntasks": job.nodes * profile.processes,
        "ntasks_per_node": profile.processes,
        "srun": [f"--cpus-per-task={profile.cpus_per_process}"],
        "container": container_options(profile),
        "rank_python": python,
        "command": [*command, CACHE_OVERRIDE] if caches else command,
        "cache": f"{profile.scratch}/bd3_scale" if caches else None,
        **({"sources": sources} if sources else {}),
        "preflight": _preflight(job, python),
        "deadlines": profile.deadlines.by_phase(data),
        "warning_seconds": profile.warning_seconds,
        "grace_seconds": 0.75 * profile.warning_seconds,
        "max_failures": profile.max_failures,
        "chain": job.chain,
        "exclude": list(job.exclude),
        "steps": job.recipe.train.steps,
    }


def container_options(profile: Profile) -> list[str]:
    """Return the words between srun's options and the command of a rank that start the site's container, if any."""
    container = profile.container
    if container is None:
        return []
    if container.engine == "apptainer":
        driver = ["--nv"] if profile.gpus_per_node else []
        return ["apptainer", "exec", *driver, *(f"--bind={mount}" for mount in container.mounts), container.image]
    mounts = [f"--container-mounts={','.join(container.mounts)}"] if container.mounts else []
    return [f"--container-image={container.image}", *mounts]


def _preflight(job: Job, python: str) -> list[str] | None:
    checks = job.profile.preflight
    if checks is None:
        return None
    options = {"gpus": job.profile.gpus_per_node, "scratch": job.profile.scratch or str(job.run_dir)}
    options |= {"min-free-gb": checks.min_free_gb, "min-allreduce-gbps": checks.min_allreduce_gbps}
    options |= {"max-clock-skew": checks.max_clock_skew, "timeout": checks.timeout}
    return [python, "-m", "bd3_scale.launch.preflight", *(f"--{name}={value}" for name, value in options.items())]
