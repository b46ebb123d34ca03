"""Record the attempts of a run, each as one line of `attempts.jsonl`, even if the attempt's own supervisor died.

Needs the standard library alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bd3_scale.launch.hangs import HangDetector
from bd3_scale.launch.records import job_fields, read_json, slurm

FINAL = ("done", "failed", "stopped", "cancelled")
# The reasons of an attempt that left no line, by the state that SLURM reports of its job.
_ENDED = {
    "NODE_FAIL": "its node died",
    "BOOT_FAIL": "its node did not start",
    "TIMEOUT": "SLURM ended it at the time limit, before it could record that",
    "DEADLINE": "SLURM ended it at the deadline, before it could record that",
    "PREEMPTED": "SLURM ended it for another job, before it could record that",
    "COMPLETED": "the batch process ended without a record",
}


def read_attempts(folder: Path) -> list[dict[str, Any]]:
    """Return the ended attempts of a run, in order; lines that a full disk or a power cut cut short are skipped."""
    path, attempts = folder / "attempts.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, RecursionError):
            content = json.loads(line)
            if isinstance(content, dict):
                attempts.append(content)
    return attempts


def failures_without_progress(attempts: list[dict[str, Any]]) -> int:
    """Count the crashes and hangs since the last attempt that saved a newer checkpoint; planned stops do not count.

    Failures of an earlier submission do not count either: a person has decided to try again.
    """
    count = 0
    for attempt in reversed(attempts):
        if attempt["saved"] > attempt["from_step"] or attempt["submission"] != attempts[-1]["submission"]:
            break
        count += attempt["failure"]
    return count


def ended_attempt(
    folder: Path, record: dict[str, Any], outcome: str, reason: str, *, failure: bool, signals: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the line of an attempt, with the last step and checkpoint that the heartbeats of its ranks report."""
    states = HangDetector(folder / f"heartbeats-{record['attempt']}", 0).read().values()
    return record | {
        "ended": time.time(),
        "outcome": outcome,
        "reason": reason,
        "failure": failure,
        "step": max((state["step"] for state in states), default=record["from_step"]),
        "saved": max((state["saved"] for state in states), default=record["from_step"]),
        "signals": list(signals),
    }


def write_attempt(folder: Path, line: dict[str, Any]) -> None:
    """Append the line of an ended attempt, flushed to disk."""
    path = folder / "attempts.jsonl"
    # A full disk may have cut the last line short: this one must not continue it.
    complete = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
    with path.open("a") as file:
        file.write("\n" * (not complete) + json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
    (folder / "current.json").unlink(missing_ok=True)


def record_lost_attempt(folder: Path) -> None:
    """Write the line of an attempt that died before it could, when the next batch process starts."""
    if not (lost := read_json(folder / "current.json")):
        return
    if lost["job_id"] == os.environ["SLURM_JOB_ID"]:
        ending = "lost", f"the batch process ended without a record: {_requeue_cause(lost)}", False
    else:
        ending = _ending_from_slurm(folder, lost) or ("lost", "the batch process ended without a record", False)
    outcome, reason, failure = ending
    write_attempt(folder, ended_attempt(folder, lost, outcome, reason, failure=failure))


def record_ended_job(folder: Path, jobs: Sequence[str]) -> None:
    """Write the line of an attempt that died, or of a job that never started one, if SLURM knows how the job ended.

    jobs: the jobs of the newest submission, none of which is active.
    """
    record = read_json(folder / "current.json") or _record_of_unstarted(folder, jobs)
    if record and (ending := _ending_from_slurm(folder, record)):
        outcome, reason, failure = ending
        write_attempt(folder, ended_attempt(folder, record, outcome, reason, failure=failure))


def _record_of_unstarted(folder: Path, jobs: Sequence[str]) -> dict[str, Any]:
    """Return the record of a job that ended in the queue or before its supervisor ran; empty if it has a line."""
    attempts, submission = read_attempts(folder), read_json(folder / "job.json").get("submission")
    last: dict[str, Any] = attempts[-1] if attempts else {"submission": None, "job_id": None, "outcome": "", "saved": 0}
    if not jobs or (last["submission"] == submission and last["outcome"] in FINAL):
        return {}
    fields = job_fields(jobs[-1])
    if last["job_id"] == jobs[-1]:
        # The job has its line, unless SLURM queued it again afterwards and it ended in the queue.
        if last["outcome"] != "requeued" or int(fields.get("Restarts", "0")) <= last.get("life", 1 << 30):
            return {}
    elif fields.get("JobState") == "COMPLETED":
        return {}
    now, saved = time.time(), last["saved"]
    record: dict[str, Any] = {
        "attempt": len(attempts),
        "submission": submission,
        "job_id": jobs[-1],
        "nodes": [],
        "started": now,
    }
    return record | {"from_step": saved, "life": int(fields.get("Restarts", "0"))}


def _ending_from_slurm(folder: Path, record: dict[str, Any]) -> tuple[str, str, bool] | None:
    """Return outcome, reason and whether it is a failure, from SLURM's job state; None if the job has not ended."""
    fields = job_fields(record["job_id"])
    state = fields.get("JobState", "").partition(" ")[0]
    if state == "CANCELLED":
        by = "bd3-scale stop" if (folder / "stop").exists() else "scancel"
        return "cancelled", by if record["nodes"] else f"{by}, before the ranks started", False
    if state in ("FAILED", "OUT_OF_MEMORY"):
        code, _, number = fields.get("ExitCode", "0:0").partition(":")
        how = f"was killed by {signal.Signals(int(number)).name}" if int(number) else f"ended with exit code {code}"
        return "lost", f"the batch process {how}; see logs/job-{record['job_id']}.log", True
    return ("lost", _ENDED[state], False) if state in _ENDED else None


def _requeue_cause(lost: dict[str, Any]) -> str:
    """Return why SLURM requeued a job that did not ask for it, judged by the state of its first node."""
    node = lost["nodes"][0]
    shown = slurm("scontrol", "show", "node", node, "--oneliner").stdout
    if (state := re.search(r"\sState=(\S+)", shown)) and re.search(r"DOWN|\*|FAIL|NOT_RESPONDING", state[1]):
        return f"its node {node} is {re.sub('[+*]+', ', ', state[1]).strip(', ').replace('_', ' ').lower()}"
    for field, what in (("BootTime", "has booted"), ("SlurmdStartTime", "has started its slurmd")):
        with contextlib.suppress(ValueError, TypeError):
            if _time_of(shown, field) > lost["started"]:
                return f"its node {node} {what} since"
    return f"it was killed, or its node {node} was lost for a while"


def _time_of(shown: str, field: str) -> float:
    match = re.search(rf"\s{field}=(\S+)", shown)
    return time.mktime(time.strptime(match[1] if match else "", "%Y-%m-%dT%H:%M:%S"))
