"""The attempts of a run: each becomes a line of `attempts.jsonl`, also where nobody was left to write it.

With the standard library alone.
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

from bd3_scale.launch.records import job_fields, read_json, slurm
from bd3_scale.launch.watch import Watch

FINAL = ("done", "failed", "stopped", "cancelled")
# States of jobs that have ended and left no line, by the words of its reason.
_ENDED = {
    "NODE_FAIL": "its node died",
    "BOOT_FAIL": "its node did not start",
    "TIMEOUT": "SLURM ended it at the time limit, before it could say so",
    "DEADLINE": "SLURM ended it at the deadline, before it could say so",
    "PREEMPTED": "SLURM ended it for another job, before it could say so",
    "COMPLETED": "the batch process ended without a word",
}


def read_attempts(folder: Path) -> list[dict[str, Any]]:
    """The ended attempts of a run, in order; a line that a full disk or a power cut has cut short is left out."""
    path, found = folder / "attempts.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, RecursionError):
            content = json.loads(line)
            if isinstance(content, dict):
                found.append(content)
    return found


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


def ended_attempt(
    folder: Path, record: dict[str, Any], outcome: str, reason: str, *, failure: bool, signals: Sequence[str] = ()
) -> dict[str, Any]:
    """The line of an attempt, with what its ranks told last."""
    states = Watch(folder / f"heartbeats-{record['attempt']}", 0).read().values()
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
    """Append a line for good; the attempt is over."""
    path = folder / "attempts.jsonl"
    whole = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
    with path.open("a") as file:
        file.write("\n" * (not whole) + json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
    (folder / "current.json").unlink(missing_ok=True)


def close_former_life(folder: Path) -> None:
    """Write the line of an attempt that the batch process of this job meets where it starts. It could not itself."""
    if not (lost := read_json(folder / "current.json")):
        return
    if lost["job_id"] == os.environ["SLURM_JOB_ID"]:
        told = "lost", f"the batch process ended without a word: {_what_became_of(lost)}", False
    else:
        told = _how_it_ended(folder, lost) or ("lost", "the batch process ended without a word", False)
    outcome, reason, failure = told
    write_attempt(folder, ended_attempt(folder, lost, outcome, reason, failure=failure))


def close_ended(folder: Path, jobs: Sequence[str]) -> None:
    """Write the line of an attempt, or of a job that never came to one, where SLURM says how the job has ended.

    jobs: those of the newest submission, none of which is active.
    """
    record = read_json(folder / "current.json") or _never_started(folder, jobs)
    if record and (told := _how_it_ended(folder, record)):
        outcome, reason, failure = told
        write_attempt(folder, ended_attempt(folder, record, outcome, reason, failure=failure))


def _never_started(folder: Path, jobs: Sequence[str]) -> dict[str, Any]:
    """The record of a job that ended in the queue, or before its supervisor ran; empty where its line is there."""
    attempts, submission = read_attempts(folder), read_json(folder / "job.json").get("submission")
    last: dict[str, Any] = attempts[-1] if attempts else {"submission": None, "job_id": None, "outcome": "", "saved": 0}
    if not jobs or (last["submission"] == submission and last["outcome"] in FINAL):
        return {}
    fields = job_fields(jobs[-1])
    if last["job_id"] == jobs[-1]:
        # Its line is there, unless it went back into the queue after it.
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


def _how_it_ended(folder: Path, record: dict[str, Any]) -> tuple[str, str, bool] | None:
    """Outcome, reason and whether it counts as a failure, as SLURM tells them; None where it does not say an end."""
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


def _what_became_of(lost: dict[str, Any]) -> str:
    """Why SLURM has queued a job again that did not ask for it, as far as its first node tells."""
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
    found = re.search(rf"\s{field}=(\S+)", shown)
    return time.mktime(time.strptime(found[1] if found else "", "%Y-%m-%dT%H:%M:%S"))
