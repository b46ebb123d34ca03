"""Run SLURM's commands and turn their failures into messages for people."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence

ACTIVE = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "RESIZING")


def run_command(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command and return its result. ValueError: the command is missing or does not answer."""
    if shutil.which(command[0]) is None:
        raise ValueError(
            f"{command[0]} is not on this machine: run this on a login node of the cluster, see the script with "
            "`bd3-scale submit … --dry-run`, or start a SLURM on this machine with `cluster/dev-slurm up`"
        )
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"{' '.join(command)} did not answer within 60 s: is the controller up? try `scontrol ping`"
        ) from None


def slurm(*command: str, check: bool = True) -> str:
    """Run a command and return its stdout. ValueError as `run_command`, or with the command's own error message."""
    done = run_command(*command)
    if done.returncode and check:
        raise ValueError(f"{command[0]} refuses: {' '.join((done.stderr.strip() or done.stdout.strip()).split())}")
    return done.stdout if not done.returncode else ""


def job_states(jobs: Sequence[str]) -> dict[str, str]:
    """Return the state of each job that SLURM still knows, such as RUNNING or PENDING."""
    if not jobs:
        return {}
    # One call for each job: given several ids, squeue fails if it has forgotten one of them.
    printed = [
        slurm("squeue", "--noheader", "--states=all", "--format=%i %T", f"--jobs={job}", check=False) for job in jobs
    ]
    return dict(line.split(maxsplit=1) for text in printed for line in text.splitlines() if line.strip())


def partitions() -> str:
    """Return the names of the partitions, for a message."""
    return " ".join(slurm("sinfo", "--noheader", "--format=%R", check=False).split())
