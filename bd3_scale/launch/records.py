"""What a supervised run keeps in files, and how SLURM is asked, with the standard library alone."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

from bd3_scale.resilience.terminal import clean

CACHE_OVERRIDE = "data.path={cache}"  # of the command of the ranks; each node puts its `cache_override` there


def say(text: str) -> None:
    """Print a line with the time to the log of the batch process; a log that cannot be written ends nothing."""
    with contextlib.suppress(OSError):
        print(clean(f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {text}"), flush=True)


def slurm(*command: str) -> subprocess.CompletedProcess[str]:
    """A SLURM command; one that hangs on a dead controller is given up after 30 seconds."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]} is not on this machine")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", "timed out")


def job_fields(job: str) -> dict[str, str]:
    """What SLURM knows of a job, such as its JobState and ExitCode; empty where it has forgotten it or is away."""
    shown = slurm("scontrol", "show", "job", job, "--oneliner").stdout
    if found := re.findall(r"(?:^|\s)(\w+)=(\S*)", shown):
        return dict(reversed(found))  # of two the first: what a person named comes at the end of the line
    columns = ("JobState", "ExitCode")
    told = slurm("sacct", "--noheader", "--allocations", "--parsable2", "--format=State,ExitCode", f"--jobs={job}")
    lines = told.stdout.splitlines()
    return dict(zip(columns, lines[-1].split("|"), strict=False)) if lines else {}


def kill_wait() -> float:
    """Seconds between the SIGTERM and the SIGKILL of a job that SLURM ends."""
    found = re.search(r"^KillWait\s*=\s*(\d+)", slurm("scontrol", "show", "config").stdout, re.MULTILINE)
    return float(found[1]) if found else 30.0


def read_json(path: Path) -> dict[str, Any]:
    try:
        # A pipe in its place would be waited for.
        content = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    aside = path.with_name(f".{path.name}.new")
    aside.write_text(json.dumps(content))
    aside.replace(path)


def excluded_nodes(folder: Path) -> str:
    """Nodes that the submission left out and those that a preflight found bad, as SLURM reads them."""
    bad = folder / "exclude.txt"
    found = bad.read_text().split() if bad.exists() else []
    return ",".join(sorted({*found, *read_json(folder / "job.json")["exclude"]}))


def pattern_of(folder: Path) -> str:
    """A folder as SLURM's patterns of file names spell it: a `%` of its name stands for itself."""
    return str(folder).replace("%", "%%")


def cache_folder(job: dict[str, Any]) -> str:
    """Return this node's cache of remote data: its own even where a test's nodes share a disk."""
    return f"{job['cache']}-{os.environ['SLURM_JOB_ID']}-{os.environ['SLURMD_NODENAME']}"


def cache_override(job: dict[str, Any]) -> str:
    """Return what tells a rank where its node keeps remote data, of several sources each in a folder of its name."""
    folder, key = cache_folder(job), "data.path"
    value: Any = folder
    if sources := job.get("sources"):
        key = "data.sources"
        value = [{**own, "path": f"{folder}/{own['name']}"} if own["remote"] else own for own in sources]
    # An override's value is YAML, of which JSON is a part.
    return f"{key}={json.dumps(value, ensure_ascii=False)}"
