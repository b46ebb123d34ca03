"""The job step of one attempt and what its ranks tell, with the standard library alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from bd3_scale.launch.records import pattern_of, say, slurm
from bd3_scale.launch.watch import Watch
from bd3_scale.resilience.terminal import tell

DUMP_SECONDS = 1.5
END_SECONDS = 60.0
_ENDED_BY_SLURM = re.compile(r"(Node failure|DUE TO (?:NODE FAILURE|PREEMPTION|TIME LIMIT|JOB REQUEUE))", re.IGNORECASE)
_TASK_ENDED = re.compile(r"srun: error: (\S+): tasks? ([\d,-]+): (?:Exited with exit code (\d+)|(\w.*))")


class Ranks:
    """The job step of one attempt and what its ranks tell."""

    def __init__(self, job: dict[str, Any], folder: Path, attempt: int) -> None:
        self.job, self.folder, self.heartbeats = job, folder, folder / "heartbeats"
        self.logs = Path(job["run_dir"], "logs", f"attempt-{attempt}")
        self._own_heartbeats = folder / f"heartbeats-{attempt}"
        self.first_end: tuple[int, str] | None = None  # task and how it ended
        self.ended_by_slurm: str | None = None
        self.killed = False
        self.watch = Watch(self.heartbeats, job["ntasks"])

    def start(self) -> None:
        self.logs.mkdir(parents=True, exist_ok=True)
        # A folder of their own: ranks of a former attempt, on a node that SLURM has lost, may still tell theirs.
        for old in self.folder.glob("heartbeats-*"):
            shutil.rmtree(old, ignore_errors=True)
        self._own_heartbeats.mkdir(exist_ok=True)
        link = self.folder / ".heartbeats.new"
        link.symlink_to(self._own_heartbeats.name)
        link.replace(self.heartbeats)
        self.watch = Watch(self.heartbeats, self.job["ntasks"])
        # A task that fails takes the others along; tasks that end early wait for the last.
        step = ["srun", "--kill-on-bad-exit=1", "--wait=0", "--open-mode=append"]
        step.append(f"--output={pattern_of(self.logs)}/rank%t.log")
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
        """Passes on what srun says and keeps who ended first: the others end because of it."""
        for line in self.process.stderr or ():
            tell(line.rstrip("\n"))
            if found := _ENDED_BY_SLURM.search(line):
                self.ended_by_slurm = found.group(1).lower()
            if self.first_end is None and (found := _TASK_ENDED.match(line)):
                task = int(re.split("[,-]", found.group(2))[0])
                self.first_end = task, f"exit code {found.group(3)}" if found.group(3) else found.group(4).strip()

    def wait(self) -> int:
        try:
            code = self.process.wait(END_SECONDS if self.killed else None)
        except subprocess.TimeoutExpired:
            # A node that is gone keeps srun waiting for its tasks.
            self.process.kill()
            code = self.process.wait()
        self._reader.join(5)
        return code

    def signal(self, name: str) -> None:
        slurm("scancel", f"--signal={name}", f"{os.environ['SLURM_JOB_ID']}.{self._step()}")

    def _step(self) -> str:
        steps = slurm("squeue", "--steps", "--noheader", "--format=%i", "--job", os.environ["SLURM_JOB_ID"]).stdout
        numbers = [step.partition(".")[2] for step in steps.split()]
        return max((n for n in numbers if n.isdigit()), key=int, default="0")

    def all_hold_signals(self) -> bool:
        """Return whether every task lets a signal wait until its rank can save; before, one would end it."""
        return all((self.heartbeats / f"rank{rank}.holds").exists() for rank in range(self.job["ntasks"]))

    def read(self) -> dict[int, dict[str, Any]]:
        """Return the newest heartbeat of every rank that has told something."""
        return self.watch.read()

    def dump_and_kill(self) -> None:
        """Write stacks of all ranks into their logs, and end them.

        A stopped process prints its own once it goes on, and may end what others wait in: they tell theirs before.
        """
        self.signal("USR2")
        time.sleep(DUMP_SECONDS)
        self.signal("CONT")
        time.sleep(DUMP_SECONDS)
        self.signal("KILL")
        self.killed = True

    def explain_failure(self) -> tuple[str, int | None]:
        """Tell the first failing rank with the end of its log, and its exit code where it had one."""
        states = self.read()
        failed = {rank: s for rank, s in states.items() if s["phase"] == "failed"}
        rank, how = self.first_end or (0, "ended")
        if failed and how.startswith("exit code"):
            # Errors spread within milliseconds; whoever raised first is the cause.
            rank = min(failed, key=lambda r: failed[r]["time"])
        code = int(how.rpartition(" ")[2]) if how.startswith("exit code") else None
        log = self.logs / f"rank{rank}.log"
        tail = log.read_text(errors="replace").splitlines()[-25:] if log.exists() else []
        reason = f"rank {rank}: {how}"
        if rank in failed:
            reason += f", {failed[rank]['error']}"
        say("\n  ".join([f"first to fail: {reason}; the end of {log}:", *tail]))
        return reason, code
