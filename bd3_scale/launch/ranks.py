"""Run the job step of one attempt and read what its ranks report; needs the standard library alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from bd3_scale.launch.hangs import HangDetector
from bd3_scale.launch.records import escape_pattern, say, slurm
from bd3_scale.resilience.terminal import tell

DUMP_SECONDS = 1.5  # what printing the stacks may take
END_SECONDS = 60.0  # after SIGKILL: longer means that a node is lost, and srun would wait without end
# What slurmstepd and srun print when SLURM itself ends a step.
_ENDED_BY_SLURM = re.compile(r"(Node failure|DUE TO (?:NODE FAILURE|PREEMPTION|TIME LIMIT|JOB REQUEUE))", re.IGNORECASE)
_TASK_ENDED = re.compile(r"srun: error: (\S+): tasks? ([\d,-]+): (?:Exited with exit code (\d+)|(\w.*))")


class Ranks:
    """The job step of one attempt: its processes, its logs and its heartbeats."""

    def __init__(self, job: dict[str, Any], folder: Path, attempt: int) -> None:
        self.job, self.folder, self.heartbeats = job, folder, folder / "heartbeats"
        self.logs = Path(job["run_dir"], "logs", f"attempt-{attempt}")
        self._own_heartbeats = folder / f"heartbeats-{attempt}"
        self.first_end: tuple[int, str] | None = None  # the task that ended first, and how
        self.ended_by_slurm: str | None = None
        self.killed = False
        self.hang_detector = HangDetector(self.heartbeats, job["ntasks"])

    def start(self) -> None:
        """Start the step. Every attempt gets a new folder of heartbeats, linked as `heartbeats`."""
        self.logs.mkdir(parents=True, exist_ok=True)
        # Ranks of a former attempt, on a node that SLURM has lost, may still write heartbeats into their folder.
        for old in self.folder.glob("heartbeats-*"):
            shutil.rmtree(old, ignore_errors=True)
        self._own_heartbeats.mkdir(exist_ok=True)
        link = self.folder / ".heartbeats.new"
        link.symlink_to(self._own_heartbeats.name)
        link.replace(self.heartbeats)
        self.hang_detector = HangDetector(self.heartbeats, self.job["ntasks"])
        # --kill-on-bad-exit: a failed task ends the others, which would wait for it; --wait=0: tasks may end at
        # different times, since saves do.
        step = ["srun", "--kill-on-bad-exit=1", "--wait=0", "--open-mode=append"]
        step.append(f"--output={escape_pattern(self.logs)}/rank%t.log")
        step += [
            *self.job["srun"],
            *self.job["container"],
            self.job["rank_python"],
            str(Path(__file__).with_name("supervise.py")),
            "rank",
            str(self.folder / "job.json"),
        ]
        self.process = subprocess.Popen(step, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self._reader = threading.Thread(target=self._read_errors, daemon=True)
        self._reader.start()

    def _read_errors(self) -> None:
        """Copy srun's messages to stderr; note which task ended first, since the others end because of it."""
        for line in self.process.stderr or ():
            tell(line.rstrip("\n"))
            if match := _ENDED_BY_SLURM.search(line):
                self.ended_by_slurm = match.group(1).lower()
            if self.first_end is None and (match := _TASK_ENDED.match(line)):
                task = int(re.split("[,-]", match.group(2))[0])
                self.first_end = task, f"exit code {match.group(3)}" if match.group(3) else match.group(4).strip()

    def wait(self) -> int:
        """Wait for the end of the step and return srun's exit code."""
        try:
            code = self.process.wait(END_SECONDS if self.killed else None)
        except subprocess.TimeoutExpired:
            # srun waits for the tasks of a lost node without end.
            self.process.kill()
            code = self.process.wait()
        self._reader.join(5)
        return code

    def signal(self, name: str) -> None:
        """Send a signal to all tasks of the step."""
        slurm("scancel", f"--signal={name}", f"{os.environ['SLURM_JOB_ID']}.{self._step()}")

    def _step(self) -> str:
        """Return the number of the running step: the newest one, as earlier steps have ended."""
        steps = slurm("squeue", "--steps", "--noheader", "--format=%i", "--job", os.environ["SLURM_JOB_ID"]).stdout
        numbers = [step.partition(".")[2] for step in steps.split()]
        return max((n for n in numbers if n.isdigit()), key=int, default="0")

    def all_block_signals(self) -> bool:
        """Return whether every task blocks stop signals until its rank can save; until then a signal would kill it."""
        return all((self.heartbeats / f"rank{rank}.holds").exists() for rank in range(self.job["ntasks"]))

    def read(self) -> dict[int, dict[str, Any]]:
        """Return the newest heartbeat of every rank that has written one."""
        return self.hang_detector.read()

    def dump_and_kill(self) -> None:
        """Make all ranks print their stacks into their logs, then kill them.

        Running ranks print first. A stopped one prints when SIGCONT lets it continue, which may end the collective
        that the others wait in; their stacks would then no longer show it.
        """
        self.signal("USR2")
        time.sleep(DUMP_SECONDS)
        self.signal("CONT")
        time.sleep(DUMP_SECONDS)
        self.signal("KILL")
        self.killed = True

    def explain_failure(self) -> tuple[str, int | None]:
        """Print the first failing rank with the end of its log; return the reason, and the exit code if it had one."""
        states = self.read()
        failed = {rank: s for rank, s in states.items() if s["phase"] == "failed"}
        rank, how = self.first_end or (0, "ended")
        if failed and how.startswith("exit code"):
            # An error reaches other ranks within milliseconds; the rank that raised first is the cause.
            rank = min(failed, key=lambda r: failed[r]["time"])
        code = int(how.rpartition(" ")[2]) if how.startswith("exit code") else None
        log = self.logs / f"rank{rank}.log"
        tail = log.read_text(errors="replace").splitlines()[-25:] if log.exists() else []
        reason = f"rank {rank}: {how}"
        if rank in failed:
            reason += f", {failed[rank]['error']}"
        say("\n  ".join([f"first to fail: {reason}; the end of {log}:", *tail]))
        return reason, code
