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


def say(text: str) -> None:
    """Print a line with the time to the log of the batch process; a log that cannot be written ends nothing."""
    with contextlib.suppress(OSError):
        print(clean(f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {text}"), flush=True)


def slurm(*command: str) -> subprocess.CompletedProcess[str]:
    """A SLURM command; one that hangs on a dead controller is given up after 30 seconds."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", "timed out")


def job_field(name: str) -> str:
    shown = slurm("scontrol", "show", "job", os.environ["SLURM_JOB_ID"], "--oneliner").stdout
    found = re.search(rf"(?:^|\s){name}=(\S+)", shown)
    return found.group(1) if found else "unknown"


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    aside = path.with_name(f".{path.name}.new")
    aside.write_text(json.dumps(content))
    aside.replace(path)


def read_attempts(folder: Path) -> list[dict[str, Any]]:
    """The ended attempts of a run, in order."""
    path = folder / "attempts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def failures_without_progress(attempts: list[dict[str, Any]]) -> int:
    """Crashes and hangs since an attempt that left a newer checkpoint than it found; planned stops do not count.

    Those of an earlier submission do not count either: a person has decided to try again.
    """
    count = 0
    for attempt in reversed(attempts):
        if attempt["saved"] > attempt["from_step"] or attempt["submission"] != attempts[-1]["submission"]:
            break
        count += attempt["failure"]
    return count


def excluded_nodes(folder: Path) -> str:
    """Nodes that the submission left out and those that a preflight found bad, as SLURM reads them."""
    bad = folder / "exclude.txt"
    found = bad.read_text().split() if bad.exists() else []
    return ",".join(sorted({*found, *read_json(folder / "job.json")["exclude"]}))


def cache_folder(job: dict[str, Any]) -> str:
    """This node's cache of remote data: its own even where a test's nodes share a disk."""
    return f"{job['cache']}-{os.environ['SLURM_JOB_ID']}-{os.environ['SLURMD_NODENAME']}"
