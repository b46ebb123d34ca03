"""Read and write the files of a supervised run, and run SLURM commands; needs the standard library alone."""

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

CACHE_OVERRIDE = "data.path={cache}"  # a placeholder in the ranks' command; each node puts `cache_override` there


def say(text: str) -> None:
    """Print a line with the time to the log of the batch process; a log that cannot be written is no error."""
    with contextlib.suppress(OSError):
        print(clean(f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {text}"), flush=True)


def slurm(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a SLURM command, for at most 30 seconds: with a dead controller it would hang. Failures become exit codes."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]} is not on this machine")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", "timed out")


def job_fields(job: str) -> dict[str, str]:
    """Return SLURM's fields of a job, such as JobState and ExitCode; empty if SLURM has forgotten it or is down."""
    shown = slurm("scontrol", "show", "job", job, "--oneliner").stdout
    if fields := re.findall(r"(?:^|\s)(\w+)=(\S*)", shown):
        # The first of two equal names counts: text that a user chose, such as a comment, comes at the end of the line.
        return dict(reversed(fields))
    columns = ("JobState", "ExitCode")
    done = slurm("sacct", "--noheader", "--allocations", "--parsable2", "--format=State,ExitCode", f"--jobs={job}")
    lines = done.stdout.splitlines()
    return dict(zip(columns, lines[-1].split("|"), strict=False)) if lines else {}


def kill_wait() -> float:
    """Return the seconds between SIGTERM and SIGKILL when SLURM ends a job (KillWait, 30 by default)."""
    match = re.search(r"^KillWait\s*=\s*(\d+)", slurm("scontrol", "show", "config").stdout, re.MULTILINE)
    return float(match[1]) if match else 30.0


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty if the file is missing or holds something else."""
    try:
        # Opening a pipe of this name would block.
        content = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object, atomically for readers."""
    partial = path.with_name(f".{path.name}.new")
    partial.write_text(json.dumps(content))
    partial.replace(path)


def excluded_nodes(folder: Path) -> str:
    """Return the nodes that the submission excluded and those that failed a preflight, in SLURM's format."""
    bad = folder / "exclude.txt"
    nodes = bad.read_text().split() if bad.exists() else []
    return ",".join(sorted({*nodes, *read_json(folder / "job.json")["exclude"]}))


def escape_pattern(folder: Path) -> str:
    """Return a folder for use in SLURM's file name patterns, where `%%` stands for a `%`."""
    return str(folder).replace("%", "%%")


def cache_folder(job: dict[str, Any]) -> str:
    """Return this node's cache of remote data; the name holds job and node, as nodes of a test may share a disk."""
    return f"{job['cache']}-{os.environ['SLURM_JOB_ID']}-{os.environ['SLURMD_NODENAME']}"


def cache_override(job: dict[str, Any]) -> str:
    """Return the override that tells a rank where its node caches remote data; sources get a folder each, by name."""
    folder, key = cache_folder(job), "data.path"
    value: Any = folder
    if sources := job.get("sources"):
        key = "data.sources"
        value = [{**source, "path": f"{folder}/{source['name']}"} if source["remote"] else source for source in sources]
    # The value of an override is YAML, and JSON is valid YAML.
    return f"{key}={json.dumps(value, ensure_ascii=False)}"
