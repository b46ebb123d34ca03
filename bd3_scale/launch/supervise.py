"""The batch process of a SLURM job, with the standard library alone: starts the ranks, watches them, decides what next.

    python supervise.py keep JOB.json     exec'ed by the batch script, so that SLURM's signals reach it: starts the next
    python supervise.py job JOB.json      the supervisor; should somebody kill it, the first one tells and goes on
    python supervise.py rank JOB.json     each task of its `srun`: SLURM's variables become torchrun's

An attempt is one life of the ranks. What becomes of the job after it:

| the ranks                                            | the job                                                  |
|------------------------------------------------------|----------------------------------------------------------|
| took all steps                                       | ends well                                                |
| saved and stopped before the time limit or when      | goes back into the queue; costs nothing                  |
| pre-empted                                           |                                                          |
| crashed, or hung until a deadline                    | goes back, while fewer than `max_failures` attempts in a |
|                                                      | row have brought no newer checkpoint; else it fails      |
| said that a person must mend something (exit code 2) | fails                                                    |
| were stopped by `bd3-scale stop`, or by scancel      | stays stopped                                            |

Every attempt is a line of `attempts.jsonl`; where the batch process itself was killed, or its node died, the next one,
`status` or `requeue` writes it (see `launch.attempts`). What ranks tell: `resilience.heartbeat`.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import math
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Started by its path with a site's own Python, where bd3_scale need not be installed.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bd3_scale.launch.attempts import (
    FINAL,
    close_former_life,
    ended_attempt,
    failures_without_progress,
    read_attempts,
    write_attempt,
)
from bd3_scale.launch.ranks import Ranks
from bd3_scale.launch.records import (
    CACHE_OVERRIDE,
    cache_folder,
    cache_override,
    excluded_nodes,
    job_fields,
    kill_wait,
    read_json,
    say,
    slurm,
    write_json,
)

POLL_SECONDS = 0.5
LOCK_SECONDS = 120.0
STEPS_OF_A_LIFE = 3  # of a job until it is requeued: preflight, ranks, cleaning of caches
LIVES_APART = 4
PERSON_MUST_MEND = 2  # the exit code of a rank whose recipe, data or machine is wrong
LAST_SECONDS = 3.0  # before SLURM's SIGKILL, to write a line in
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class Supervisor:
    """One attempt of a job."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.job = folder, read_json(folder / "job.json")
        self.job_id, self.life = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.signals: list[str] = []
        self.terminated = math.inf  # when SIGTERM came
        self.ended: tuple[str, str, bool] | None = None
        self.parent = os.getppid()
        self.record: dict[str, Any] = {}
        self.attempts = read_attempts(folder)

    def run(self) -> int:
        """Runs the attempt and gives the exit code of the job."""
        for number in SIGNALS:
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # which `keep` has held back until now
        self.folder.chmod(0o700)
        close_former_life(self.folder)
        self.attempts = read_attempts(self.folder)
        if self._is_final():
            say(f"nothing to do: the run is {self.attempts[-1]['outcome']} ({self.attempts[-1]['reason']})")
            return 0
        self._begin()
        self._skip_former_step_numbers()
        if problem := self._preflight():
            return self._end(*(self._ended_by_others() or ("preflight", problem, True)))
        self.ranks.start()
        planned, hung = self._watch()
        if self.ended:
            return self._end(*self.ended)
        code = self.ranks.wait()
        self._clean_caches()
        return self._decide(code, planned, hung)

    def take_over(self, code: int) -> int:
        """What becomes of the job where the process that ran this ended with `code` before its attempt had its line."""
        self.record = read_json(self.folder / "current.json")
        if (self.record.get("job_id"), self.record.get("life")) != (self.job_id, self.life):
            return code if code > 0 else 128 - code
        self.number = self.record["attempt"]
        self.ranks = Ranks(self.job, self.folder, self.number)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return self._end(*(self._ended_by_others() or ("requeue", f"the supervisor {how}", True)))

    def _note(self, number: int, _: object) -> None:
        name = signal.Signals(number).name
        self.signals += [name] * (name not in self.signals)
        if number == signal.SIGTERM:
            self.terminated = time.monotonic()

    def _is_final(self) -> bool:
        """Whether an earlier job of this submission has decided; one that SLURM starts again was not cancelled."""
        last = self.attempts[-1] if self.attempts else {"submission": None}
        if last["submission"] != self.job["submission"] or last["outcome"] not in FINAL:
            return False
        return last["outcome"] != "cancelled" or last["job_id"] != self.job_id

    def _begin(self) -> None:
        environment = os.environ
        nodes = slurm("scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]).stdout.split()
        address = re.search(r"NodeAddr=(\S+)", slurm("scontrol", "show", "node", nodes[0], "--oneliner").stdout)
        environment["MASTER_ADDR"] = address.group(1) if address else nodes[0]
        self.number = len(self.attempts)
        environment["MASTER_PORT"] = str(20000 + secrets.randbelow(10000))
        saved = self.attempts[-1]["saved"] if self.attempts else 0
        self.record = {
            "attempt": self.number,
            "submission": self.job["submission"],
            "job_id": self.job_id,
            "life": self.life,
            "nodes": nodes,
            "started": time.time(),
            "from_step": saved,
        }
        self._wait_for_the_run()
        write_json(self.folder / "current.json", self.record)
        self.ranks = Ranks(self.job, self.folder, self.number)
        say(f"attempt {self.number} of {self.job['name']} on {' '.join(nodes)}, after step {saved}")
        for path, digest in self.job["recipe_files"].items():
            if not Path(path).exists() or hashlib.sha256(Path(path).read_bytes()).hexdigest() != digest:
                say(f"note: {path} changed after it was submitted; the stored {self.folder / 'recipe.yaml'} counts")

    def _skip_former_step_numbers(self) -> None:
        """Takes other step numbers than the job's former lives.

        A requeued job numbers its steps from 0 again, and slurmctld repeats the kill of a step a minute after a node
        was too slow to answer it: it would hit the ranks of this attempt (seen with SLURM 22.05 on a loaded machine).
        """
        for _ in range(STEPS_OF_A_LIFE * (self.life % LIVES_APART)):
            slurm("srun", "--nodes=1", "--ntasks=1", "true")

    def _wait_for_the_run(self) -> None:
        """Ranks of a former attempt, on a node that SLURM has lost, may still hold the run directory."""
        lock, until = Path(self.job["run_dir"], ".lock"), time.monotonic() + LOCK_SECONDS
        while lock.exists() and not self.signals:
            with lock.open("a+") as file:
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                except OSError:
                    if time.monotonic() > until:
                        say(f"{lock} is still held; starting all the same, the ranks will refuse")
                        return
            time.sleep(1)

    def _preflight(self) -> str | None:
        """Checks the nodes; a bad one goes on the run's exclude list. None where all is well or nothing is asked."""
        if not (command := self.job["preflight"]):
            return None
        out = self.folder / "preflight"
        out.mkdir(exist_ok=True)
        for old in out.glob("*.json"):
            old.unlink()
        nodes = len(self.record["nodes"])
        step = ["srun", f"--ntasks={nodes}", "--ntasks-per-node=1", "--wait=0", *self.job["container"], *command]
        step += ["--out", str(out)]
        code = subprocess.run(step, check=False).returncode
        reports = [read_json(path) for path in sorted(out.glob("*.json"))]
        bad = [report for report in reports if report["problems"]]
        if bad:
            with (self.folder / "exclude.txt").open("a") as file:
                file.writelines(f"{report['node']}\n" for report in bad)
            return "preflight: " + "; ".join(f"{r['node']}: {', '.join(r['problems'])}" for r in bad)
        shared = sorted({problem for report in reports for problem in report.get("job_problems", [])})
        return f"preflight: {'; '.join(shared) or f'srun ended with {code}'}" if code else None

    def _watch(self) -> tuple[str | None, str | None]:
        """Until the step ends: why it was asked to stop, and how it hung, where it was and did."""
        planned, hung, asked, asked_at = None, None, False, 0.0
        while self.ranks.process.poll() is None:
            time.sleep(POLL_SECONDS)
            if self.signals and planned is None:
                planned, asked_at = self._why_asked(), time.monotonic()
                say(f"{self.signals[0]}: {planned}; the ranks save and stop")
            if time.monotonic() - self.terminated > self._patience and (ended := self._ended_by_others()):
                self.ended = ended
                break
            if planned and not asked and self.ranks.all_hold_signals():
                self.ranks.signal("USR1")
                asked = True
            if planned and not hung and time.monotonic() - asked_at > self.job["grace_seconds"]:
                hung = f"not saved {self.job['grace_seconds']:g} s after it was asked to ({planned})"
            if not planned and not hung:
                hung = self.ranks.watch.overdue(self.job["deadlines"])
            if hung and self.ranks.process.poll() is None:
                say(f"{hung}; stacks of all ranks are in {self.ranks.logs}")
                self.ranks.dump_and_kill()
                break
            if read_json(self.folder / "current.json").get("started") != self.record["started"]:
                say("another attempt has taken over: this node was cut off")
                self.ranks.signal("KILL")
                self.ranks.process.kill()
                os._exit(1)
        return planned, hung

    @functools.cached_property
    def _patience(self) -> float:
        """Seconds after SIGTERM for which ranks are waited for: after them SLURM kills this process, too."""
        return max(1.0, kill_wait() - LAST_SECONDS)

    def _clean_caches(self) -> None:
        if self.job["cache"]:
            nodes = len(self.record["nodes"])
            step = ["srun", f"--ntasks={nodes}", "--ntasks-per-node=1", "--wait=0", sys.executable]
            slurm(*step, os.path.abspath(__file__), "clean", str(self.folder / "job.json"))

    def _why_asked(self) -> str:
        if (self.folder / "stop").exists():
            return "bd3-scale stop"
        if self.signals[0] != "SIGUSR1":
            return "pre-empted or cancelled"
        with contextlib.suppress(ValueError):
            end = time.mktime(time.strptime(job_fields(self.job_id).get("EndTime", ""), "%Y-%m-%dT%H:%M:%S"))
            # SLURM may warn up to a minute early.
            if end - time.time() > self.job["warning_seconds"] + 90:
                return "bd3-scale requeue"
        return "time limit"

    def _decide(self, code: int, planned: str | None, hung: str | None) -> int:
        states = self.ranks.read()
        phases = {state["phase"] for state in states.values()}
        if code == 0 and phases == {"done"}:
            return self._end("done", "all steps are taken", False)
        stopped = code == 0 and "stopped" in phases
        if ended := self._ended_by_others():
            return self._end(*ended)
        if (self.folder / "stop").exists():
            return self._end("stopped", "bd3-scale stop", False)
        if stopped:
            return self._end("requeue", planned or "pre-empted", False)
        if hung:
            return self._end("requeue", hung, True)
        reason, rank_code = self.ranks.explain_failure()
        if "Terminated" in reason:
            return self._end("requeue", f"{reason}: pre-empted before it could save", False)
        return self._end("failed" if rank_code == PERSON_MUST_MEND else "requeue", reason, True)

    def _ended_by_others(self) -> tuple[str, str, bool] | None:
        """Outcome, reason and whether it is a failure where somebody has decided already.

        A requeue from here would undo a person's scancel.
        """
        fields = job_fields(self.job_id)
        state, why = fields.get("JobState", "RUNNING"), self.ranks.ended_by_slurm
        if os.getppid() != self.parent:
            return "lost", "the batch process was killed", True
        if state == "RUNNING":
            return None
        if why == "due to time limit":
            return "lost", "SLURM ended it at the time limit", False
        if int(fields.get("Restarts", "0")) > self.life:
            return "requeued", f"SLURM ended it: {why or 'job requeue'}", False
        if why is not None or state in ("PENDING", "REQUEUED", "PREEMPTED", "NODE_FAIL"):
            return "requeued", f"SLURM ended it: {why or state.lower()}", False
        return "cancelled", "bd3-scale stop" if (self.folder / "stop").exists() else "scancel", False

    def _end(self, verdict: str, reason: str, failure: bool) -> int:
        """Writes the attempt's line and sends the job back into the queue where the verdict says so."""
        again = verdict in ("requeue", "preflight")
        outcome = "requeued" if again else verdict
        line = ended_attempt(self.folder, self.record, outcome, reason, failure=failure, signals=self.signals)
        failures = failures_without_progress([*self.attempts, line])
        if again and failures >= self.job["max_failures"]:
            again, line["outcome"] = False, "failed"
            line["reason"] += f" ({failures} attempts failed without a newer checkpoint)"
        write_attempt(self.folder, line)
        say(f"attempt {self.number} {line['outcome']} at step {line['step']}: {line['reason']}")
        if not again:
            return 0 if line["outcome"] in ("done", "stopped", "requeued") else 1
        return self._requeue()

    def _requeue(self) -> int:
        jobs = [self.job_id]
        if self.job["chain"]:  # its next job goes on
            jobs = read_json(self.folder / "submitted.json").get("jobs", [])
        else:
            # The requeue ends this process with SIGTERM; it must live long enough to name the bad nodes.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            asked = slurm("scontrol", "requeue", jobs[0])
            if asked.returncode:
                say(f"SLURM does not requeue: {asked.stderr.strip()}; `bd3-scale requeue {self.job['run_dir']}` does")
                return 1
        if names := excluded_nodes(self.folder):
            for job in jobs:
                slurm("scontrol", "update", f"JobId={job}", f"ExcNodeList={names}")
        return 0


def keep(job: str) -> int:
    """Runs the supervisor as a process of its own and passes SLURM's signals on; gives the exit code of the job."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # the supervisor inherits it, and lets them in once it is ready
    process = subprocess.Popen([sys.executable, "-u", os.path.abspath(__file__), "job", job])
    for number in SIGNALS:
        signal.signal(number, lambda n, _: process.send_signal(n))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    code = process.wait()
    return Supervisor(Path(job).parent).take_over(code) if code else 0


def run_rank(folder: Path) -> None:
    """Becomes the rank of this task."""
    job, environment, heartbeats = read_json(folder / "job.json"), os.environ, (folder / "heartbeats").resolve()
    environment |= {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": environment["SLURM_NTASKS"],
        "LOCAL_WORLD_SIZE": str(job["ntasks_per_node"]),
        "BD3_SCALE_HEARTBEATS": str(heartbeats),
    }
    # What comes before the rank can save waits until it can.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
    (heartbeats / f"rank{environment['RANK']}.holds").touch()
    command = [cache_override(job) if word == CACHE_OVERRIDE else word for word in job["command"]]
    os.execvp(command[0], command)


def main(mode: str, job: str) -> int:
    folder = Path(job).parent
    modes: dict[str, Callable[[], int | None]] = {
        "keep": lambda: keep(job),
        "job": lambda: Supervisor(folder).run(),
        "rank": lambda: run_rank(folder),
        "clean": lambda: shutil.rmtree(cache_folder(read_json(folder / "job.json")), ignore_errors=True),
    }
    return modes[mode]() or 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
