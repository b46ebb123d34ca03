"""Examine a site for `bd3-scale doctor --cluster`: compare its profile with SLURM, and let a job examine one node."""

from __future__ import annotations

import contextlib
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bd3_scale.launch.doctor import ANSWER, CLOCK, TOKEN
from bd3_scale.launch.findings import Finding, checked
from bd3_scale.launch.job import batch_script, container_options, node_directives, site_environment
from bd3_scale.launch.profile import Preflight, Profile
from bd3_scale.launch.records import escape_pattern, read_json
from bd3_scale.launch.slurm import partitions, run_command, slurm
from bd3_scale.launch.submit import ask_slurm

MINUTES = 10
# A network file system may show a new name this late on another machine.
LATE_SECONDS = 60.0
LAST_LINES = 4  # of a job's log
CLOCK_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Visit:
    """The result of the job: the node's name, and the findings about it and the files it shares with this machine."""

    node: str
    findings: list[Finding]


def default_folders(profile: Profile) -> list[Path]:
    """Return the folders of a site's runs: its shared storage, or the current folder where the profile names none."""
    return [Path(folder) for folder in profile.shared_storage] or [Path.cwd()]


def site(profile: Profile) -> list[Finding]:
    """Compare a profile with what SLURM says about the site. ValueError: SLURM is not here, or does not answer."""
    found = [Finding("SLURM", "version", slurm("sinfo", "--version").strip())]
    name = profile.partition or _default_partition()
    fields = _fields(slurm("scontrol", "show", "partition", name, "--oneliner", check=False))
    if not fields:
        fix = f"set the profile's `partition` to one of: {partitions()}"
        return [*found, Finding("SLURM", "partition", f"{name} does not exist", "problem", "it exists", fix)]
    found.append(
        checked(
            "SLURM",
            "partition",
            f"{name}: {fields.get('State', '?')}, {fields.get('TotalNodes', '?')} nodes",
            rule="it is UP",
            fix=f"choose another, or wait: partitions here are {partitions()}",
            broken=fields.get("State") != "UP",
        )
    )
    found.append(_time_limit(profile, fields.get("MaxTime", "UNLIMITED")))
    config = slurm("scontrol", "show", "config", check=False)
    requeue = re.search(r"^JobRequeue\s*=\s*(\d)", config, re.MULTILINE)
    shown = f"JobRequeue={requeue[1] if requeue else '?'}, the profile says {'yes' if profile.requeue else 'no'}"
    rule = "where the site refuses `scontrol requeue`: requeue: false in the profile, and submit with --chain"
    found.append(Finding("SLURM", "requeue", shown, rule=rule))
    if profile.gpus_per_node:
        found.append(_gres(profile.gpus_per_node, slurm("sinfo", "--noheader", f"--partition={name}", "--format=%G")))
    return found


def _default_partition() -> str:
    names = slurm("sinfo", "--noheader", "--format=%P").split()
    return next((name[:-1] for name in names if name.endswith("*")), names[0] if names else "none")


def _fields(line: str) -> dict[str, str]:
    return dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", line))


def _time_limit(profile: Profile, longest: str) -> Finding:
    most = None if longest == "UNLIMITED" else slurm_seconds(longest)
    return checked(
        "SLURM",
        "time limit",
        f"{profile.time_limit} of at most {longest}",
        rule="the profile's time_limit is not above the partition's",
        fix=f"set time_limit to {longest} or less: the run goes on in job after job",
        broken=most is not None and slurm_seconds(profile.time_limit) > most,
    )


def slurm_seconds(limit: str) -> int:
    """Return a time limit as sbatch reads it in seconds: 90, 1:30:00, 30:00 (minutes first), 1-00, 1-00:00:00."""
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    hours, minutes, seconds = [*parts, 0, 0][:3] if dash else ([0, *parts, 0] if len(parts) < 3 else parts)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _gres(wanted: int, gres: str) -> Finding:
    most = most_gpus(gres)
    return checked(
        "SLURM",
        "GPUs of a node (GRES)",
        str(most),
        rule=f"{wanted} or more, the profile's gpus_per_node",
        fix="set gpus_per_node to what nodes have, or choose another partition (sinfo -o '%R %G')",
        broken=most < wanted,
    )


def most_gpus(gres: str) -> int:
    """Return the most GPUs of a node by sinfo's %G, such as `gpu:h100:8(S:0-1),nvme:1`."""
    return max(
        (sum(map(int, re.findall(r"\bgpu:(?:[^:,(\s]+:)?(\d+)", line))) for line in gres.splitlines()), default=0
    )


def visit(profile: Profile, folders: Sequence[Path], say: Callable[[str], object]) -> Visit:
    """Let a job examine one node, and compare what it reads in `folders`. The first of them holds the job's answer.

    ValueError: SLURM refuses the job. OSError: the first folder cannot be written.
    """
    with _tokens(folders) as tokens, tempfile.TemporaryDirectory(prefix=".bd3-doctor-", dir=folders[0]) as name:
        out = Path(name).absolute()
        batch = out / "job.sh"
        batch.write_text(_script(profile, [folder.absolute() for folder in folders], out))
        (out / CLOCK).touch()
        ask_slurm(batch.read_text())
        code, clock = _wait(batch, out, say)
        answer = _answer(out)
        if not answer:
            return Visit("no node", [_no_answer(out, code)])
        found = [Finding(**finding) for finding in answer["findings"]]
        found += [_same_file(Path(folder), token, answer["tokens"][folder]) for folder, token in tokens.items()]
        found += [_clocks(clock, _limit_of_clocks(profile))]
        return Visit(answer["node"], found)


def _limit_of_clocks(profile: Profile) -> float:
    return (profile.preflight or Preflight()).max_clock_skew


@contextmanager
def _tokens(folders: Sequence[Path]) -> Iterator[dict[str, str]]:
    """Write a file with a random text into each folder, for as long as the block runs."""
    tokens = {str(folder.absolute()): secrets.token_hex(8) for folder in folders}
    try:
        for folder, token in tokens.items():
            # `machine.storage` reports a folder that cannot be written.
            with contextlib.suppress(OSError):
                (Path(folder) / TOKEN).write_text(token)
        yield tokens
    finally:
        for folder in tokens:
            with contextlib.suppress(OSError):
                (Path(folder) / TOKEN).unlink()


def _script(profile: Profile, folders: Sequence[Path], out: Path) -> str:
    python = profile.container.python if profile.container else sys.executable
    asked = profile.preflight or Preflight()
    scratch = profile.scratch or str(folders[0])
    options = {"out": out, "gpus": profile.gpus_per_node, "scratch": scratch, "min-free-gb": asked.min_free_gb}
    command = ["srun", "--ntasks=1", *container_options(profile), python, "-m", "bd3_scale.launch.doctor"]
    command += [f"--{name}={value}" for name, value in options.items()]
    command += [f"--folder={folder}" for folder in folders]
    directives = ["job-name=bd3-doctor", *node_directives(profile, 1), f"time={MINUTES}", "no-requeue"]
    directives += [f"output={escape_pattern(out)}/job.log"]
    return batch_script(profile, directives, "`bd3-scale doctor` on one node", site_environment(profile), command)


def _wait(batch: Path, out: Path, say: Callable[[str], object]) -> tuple[int, tuple[float, float] | None]:
    """Submit the job and wait; return its exit code, and the node's time with the time here when it was first read."""
    command = ["sbatch", "--parsable", "--wait", str(batch)]
    seen = None
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        job = process.stdout.readline().strip().partition(";")[0]
        if not job:
            raise ValueError(f"sbatch refuses: {' '.join(process.stderr.read().split())}")
        say(f"job {job} examines one node; Ctrl-C cancels it")
        try:
            while process.poll() is None:
                if seen is None and (text := (out / CLOCK).read_text()).endswith("\n"):
                    seen = float(text), time.time()
                time.sleep(CLOCK_POLL_SECONDS)
        except BaseException:
            run_command("scancel", job)
            raise
        return process.returncode, seen


def _answer(out: Path) -> dict[str, Any]:
    until = time.monotonic() + LATE_SECONDS
    # A failed job may leave no answer. Its log comes from the same node: once it is visible, so are the other files.
    while not (answer := read_json(out / ANSWER)) and not (out / "job.log").exists() and time.monotonic() < until:
        time.sleep(1)
    return answer


def _no_answer(out: Path, code: int) -> Finding:
    with contextlib.suppress(OSError):
        lines = [line for line in (out / "job.log").read_text(errors="replace").splitlines() if line.strip()][
            -LAST_LINES:
        ]
        value = f"the job ended with {code}: {' | '.join(lines) or 'its log is empty'}"
        return Finding(
            "SLURM", "job", value, "problem", "it writes an answer", "correct what its log says, and try again"
        )
    value = f"the job ended with {code}, and neither its answer nor its log are in {out.parent}"
    fix = "the node does not see that folder: name one on shared storage with --folder, or in the profile"
    return Finding("storage", str(out.parent), value, "problem", "the node sees the same folder", fix)


def _same_file(folder: Path, token: str, seen: str) -> Finding:
    return checked(
        "storage",
        f"{folder}: shared",
        "the node reads the same file" if seen == token else seen or "the node reads another file",
        rule="the node reads the same files as this machine",
        fix="put runs and data on storage that all nodes see, and name it in the profile's shared_storage",
        broken=seen != token,
    )


def _clocks(clock: tuple[float, float] | None, limit: float) -> Finding:
    if clock is None:
        return Finding(
            "clock",
            "offset",
            "not read",
            "warning",
            f"at most {limit:g} s",
            "run it again: the job ended before its clock was read",
        )
    offset = clock[0] - clock[1]
    return checked(
        "clock",
        "offset",
        f"{offset:+.1f} s from this machine's",
        rule=f"at most {limit:g} s (read within about {CLOCK_POLL_SECONDS:g} s)",
        fix="synchronise both clocks, or report it to the site (chronyc tracking shows the offset)",
        broken=abs(offset) > limit,
    )
