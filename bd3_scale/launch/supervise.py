"""Supervise a SLURM job, with the standard library alone: start the ranks, watch them, decide what follows.

    python supervise.py keep JOB.json     the batch script execs this, so that SLURM's signals reach it: starts `job`
    python supervise.py job JOB.json      the supervisor; if it is killed, `keep` records that and requeues the job
    python supervise.py rank JOB.json     each task of the supervisor's srun: sets torchrun's variables from SLURM's
    python supervise.py clean JOB.json    removes this node's cache of remote data

An attempt is one start of the ranks. After it, the job continues as follows:

| the ranks                                            | the job                                                  |
|------------------------------------------------------|----------------------------------------------------------|
| took all steps                                       | succeeds                                                 |
| saved and stopped before the time limit or when      | is requeued; this does not count as a failure            |
| pre-empted                                           |                                                          |
| crashed, or hung until a deadline                    | is requeued, unless `max_failures` attempts in a row     |
|                                                      | brought no newer checkpoint: then it fails               |
| ended with exit code 2: a person must fix something  | fails                                                    |
| were stopped by `bd3-scale stop`, or by scancel      | stays stopped                                            |

Every attempt becomes a line of `attempts.jsonl`. If the batch process itself was killed or its node died, the next
batch process, `status` or `requeue` writes the line, see `launch.attempts`. Ranks report through
`resilience.heartbeat`.
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
    # The site's own Python runs this file by its path; bd3_scale need not be installed there.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bd3_scale.launch.attempts import (
    FINAL,
    ended_attempt,
    failures_without_progress,
    read_attempts,
    record_lost_attempt,
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
STEPS_PER_LIFE = 3  # job steps between two requeues: preflight, ranks, cleaning of caches
LIVES_BEFORE_REUSE = 4  # then step numbers are used again: a repeated kill comes a minute late, not four lives
EXIT_USER_ERROR = 2  # a rank's exit code if recipe, data or machine is wrong: a retry would fail again
LAST_SECONDS = 3.0  # reserved before SLURM's SIGKILL, to write the attempt's line
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class Supervisor:
    """One attempt of a job."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.job = folder, read_json(folder / "job.json")
        self.job_id, self.life = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.signals: list[str] = []
        self.terminated = math.inf  # the time of SIGTERM
        self.ended: tuple[str, str, bool] | None = None  # outcome, reason and failure, if SLURM or a person decided
        self.parent = os.getppid()
        self.record: dict[str, Any] = {}
        self.attempts = read_attempts(folder)

    def run(self) -> int:
        """Run the attempt and return the exit code of the job."""
        for number in SIGNALS:
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # `keep` blocked them until here
        self.folder.chmod(0o700)
        record_lost_attempt(self.folder)
        self.attempts = read_attempts(self.folder)
        if self._is_final():
            say(f"nothing to do: the run is {self.attempts[-1]['outcome']} ({self.attempts[-1]['reason']})")
            return 0
        self._begin()
        self._skip_step_numbers()
        if problem := self._preflight():
            return self._end(*(self._decided_by_others() or ("preflight", problem, True)))
        self.ranks.start()
        planned, hung = self._watch()
        if self.ended:
            return self._end(*self.ended)
        code = self.ranks.wait()
        self._clean_caches()
        return self._decide(code, planned, hung)

    def handle_supervisor_death(self, code: int) -> int:
        """Decide about the job after the supervisor process ended with `code` without writing its attempt's line."""
        self.record = read_json(self.folder / "current.json")
        if (self.record.get("job_id"), self.record.get("life")) != (self.job_id, self.life):
            return code if code > 0 else 128 - code
        self.number = self.record["attempt"]
        self.ranks = Ranks(self.job, self.folder, self.number)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return self._end(*(self._decided_by_others() or ("requeue", f"the supervisor {how}", True)))

    def _note(self, number: int, _: object) -> None:
        name = signal.Signals(number).name
        self.signals += [name] * (name not in self.signals)
        if number == signal.SIGTERM:
            self.terminated = time.monotonic()

    def _is_final(self) -> bool:
        """Return whether an earlier job of this submission has reached its end.

        A cancelled attempt of this same job is not final: the job runs again, so somebody has requeued it.
        """
        last = self.attempts[-1] if self.attempts else {"submission": None}
        if last["submission"] != self.job["submission"] or last["outcome"] not in FINAL:
            return False
        return last["outcome"] != "cancelled" or last["job_id"] != self.job_id

    def _begin(self) -> None:
        """Record the new attempt and set the rendezvous address of its ranks."""
        environment = os.environ
        nodes = slurm("scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]).stdout.split()
        # The address that SLURM itself uses: the node's name need not be resolvable on the other nodes.
        address = re.search(r"NodeAddr=(\S+)", slurm("scontrol", "show", "node", nodes[0], "--oneliner").stdout)
        environment["MASTER_ADDR"] = address.group(1) if address else nodes[0]
        self.number = len(self.attempts)
        # A new port for each attempt: ranks of the former one, on a node that SLURM has lost, may still hold theirs.
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
        self._wait_for_run_lock()
        write_json(self.folder / "current.json", self.record)
        self.ranks = Ranks(self.job, self.folder, self.number)
        say(f"attempt {self.number} of {self.job['name']} on {' '.join(nodes)}, after step {saved}")
        for path, digest in self.job["recipe_files"].items():
            if not Path(path).exists() or hashlib.sha256(Path(path).read_bytes()).hexdigest() != digest:
                say(f"note: {path} changed after the submission; the run uses {self.folder / 'recipe.yaml'}")

    def _skip_step_numbers(self) -> None:
        """Use up the step numbers of the job's former lives with empty steps.

        A requeued job numbers its steps from 0 again. slurmctld repeats the kill of a step after a minute if a node
        was too slow to answer, and would hit this attempt's step of the same number (seen with SLURM 22.05 on a loaded
        machine).
        """
        for _ in range(STEPS_PER_LIFE * (self.life % LIVES_BEFORE_REUSE)):
            slurm("srun", "--nodes=1", "--ntasks=1", "true")

    def _wait_for_run_lock(self) -> None:
        """Wait for the run's lock: ranks of a former attempt, on a node that SLURM has lost, may still hold it."""
        lock, until = Path(self.job["run_dir"], ".lock"), time.monotonic() + LOCK_SECONDS
        while lock.exists() and not self.signals:
            with lock.open("a+") as file:
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                except OSError:
                    if time.monotonic() > until:
                        say(f"{lock} is still held; the ranks start all the same, and will refuse if it stays so")
                        return
            time.sleep(1)

    def _preflight(self) -> str | None:
        """Check the nodes and put bad ones on the run's exclude list. Return what is wrong, or None."""
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
        """Wait for the step's end; return why it was asked to stop and how it hung, each None if it was not."""
        planned, hung, was_signalled, planned_at = None, None, False, 0.0
        while self.ranks.process.poll() is None:
            time.sleep(POLL_SECONDS)
            if self.signals and planned is None:
                planned, planned_at = self._stop_reason(), time.monotonic()
                say(f"{self.signals[0]}: {planned}; the ranks save and stop")
            if time.monotonic() - self.terminated > self._patience and (ended := self._decided_by_others()):
                self.ended = ended
                break
            # A signal before the rank blocks it would kill the task: it has no handler yet.
            if planned and not was_signalled and self.ranks.all_block_signals():
                self.ranks.signal("USR1")
                was_signalled = True
            if planned and not hung and time.monotonic() - planned_at > self.job["grace_seconds"]:
                hung = f"not saved {self.job['grace_seconds']:g} s after it was asked to ({planned})"
            if not planned and not hung:
                hung = self.ranks.hang_detector.find_hang(self.job["deadlines"])
            if hung and self.ranks.process.poll() is None:
                say(f"{hung}; stacks of all ranks are in {self.ranks.logs}")
                self.ranks.dump_and_kill()
                break
            # SLURM requeues a job whose node it has lost; if the node was only cut off, this process still runs there.
            if read_json(self.folder / "current.json").get("started") != self.record["started"]:
                say("another attempt has taken over: this node was cut off")
                self.ranks.signal("KILL")
                self.ranks.process.kill()
                os._exit(1)
        return planned, hung

    @functools.cached_property
    def _patience(self) -> float:
        """Return how long after SIGTERM to wait for the ranks: KillWait seconds after it SLURM kills this process."""
        return max(1.0, kill_wait() - LAST_SECONDS)

    def _clean_caches(self) -> None:
        if self.job["cache"]:
            nodes = len(self.record["nodes"])
            step = ["srun", f"--ntasks={nodes}", "--ntasks-per-node=1", "--wait=0", sys.executable]
            slurm(*step, os.path.abspath(__file__), "clean", str(self.folder / "job.json"))

    def _stop_reason(self) -> str:
        """Return who asked the run to stop: a person, the time limit, or SLURM for another job."""
        if (self.folder / "stop").exists():
            return "bd3-scale stop"
        if self.signals[0] != "SIGUSR1":
            return "pre-empted or cancelled"
        with contextlib.suppress(ValueError):
            end = time.mktime(time.strptime(job_fields(self.job_id).get("EndTime", ""), "%Y-%m-%dT%H:%M:%S"))
            # `--signal` may come up to 60 s early (sbatch(1)): only an earlier one is a person's `bd3-scale requeue`.
            if end - time.time() > self.job["warning_seconds"] + 90:
                return "bd3-scale requeue"
        return "time limit"

    def _decide(self, code: int, planned: str | None, hung: str | None) -> int:
        """Decide about the job from srun's exit code and the last phases of the ranks; return its exit code."""
        states = self.ranks.read()
        phases = {state["phase"] for state in states.values()}
        if code == 0 and phases == {"done"}:
            return self._end("done", "all steps are taken", False)
        stopped = code == 0 and "stopped" in phases
        if ended := self._decided_by_others():
            return self._end(*ended)
        if (self.folder / "stop").exists():
            return self._end("stopped", "bd3-scale stop", False)
        # Ranks may have saved without a signal to this process: pre-emption signals the steps, not the batch process.
        if stopped:
            return self._end("requeue", planned or "pre-empted", False)
        if hung:
            return self._end("requeue", hung, True)
        reason, rank_code = self.ranks.explain_failure()
        if "Terminated" in reason:
            return self._end("requeue", f"{reason}: pre-empted before it could save", False)
        return self._end("failed" if rank_code == EXIT_USER_ERROR else "requeue", reason, True)

    def _decided_by_others(self) -> tuple[str, str, bool] | None:
        """Return outcome, reason and whether it is a failure, if SLURM or a person has decided already.

        Checked before every requeue: `scontrol requeue` would undo a person's scancel.
        """
        fields = job_fields(self.job_id)
        state, why = fields.get("JobState", "RUNNING"), self.ranks.ended_by_slurm
        # `keep`, the batch process, is gone: SLURM ends the job, whatever this process does.
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
        """Write the attempt's line, requeue the job if the verdict says so, and return the job's exit code."""
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
        """Requeue the job, or leave the run to the next job of a chain; exclude bad nodes. Return the exit code."""
        jobs = [self.job_id]
        if self.job["chain"]:  # the next job of the chain continues the run
            jobs = read_json(self.folder / "submitted.json").get("jobs", [])
        else:
            # SLURM sends SIGTERM to a requeued job; this process must live long enough to exclude the bad nodes below.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            done = slurm("scontrol", "requeue", jobs[0])
            if done.returncode:
                say(f"SLURM refuses to requeue: {done.stderr.strip()}; use `bd3-scale requeue {self.job['run_dir']}`")
                return 1
        # The exclude list of a job can be changed in the queue only, so after the requeue.
        if names := excluded_nodes(self.folder):
            for job in jobs:
                slurm("scontrol", "update", f"JobId={job}", f"ExcNodeList={names}")
        return 0


def keep(job: str) -> int:
    """Run the supervisor as a child process, pass SLURM's signals on, and return the exit code of the job.

    Two processes, because the supervisor may be killed outright, for example when memory runs out: this one is small
    and still writes the attempt's line.
    """
    # Blocked signals stay pending and the child inherits the mask, so none is lost before it has handlers.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    process = subprocess.Popen([sys.executable, "-u", os.path.abspath(__file__), "job", job])
    for number in SIGNALS:
        signal.signal(number, lambda n, _: process.send_signal(n))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    code = process.wait()
    return Supervisor(Path(job).parent).handle_supervisor_death(code) if code else 0


def run_rank(folder: Path) -> None:
    """Replace this process by the rank of its task."""
    job, environment, heartbeats = read_json(folder / "job.json"), os.environ, (folder / "heartbeats").resolve()
    environment |= {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": environment["SLURM_NTASKS"],
        "LOCAL_WORLD_SIZE": str(job["ntasks_per_node"]),
        "BD3_SCALE_HEARTBEATS": str(heartbeats),
    }
    # exec keeps the mask: signals that come before the rank has its handlers stay pending, and do not kill it. The file
    # tells the supervisor that it may send them.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
    (heartbeats / f"rank{environment['RANK']}.holds").touch()
    command = [cache_override(job) if word == CACHE_OVERRIDE else word for word in job["command"]]
    os.execvp(command[0], command)


def main(mode: str, job: str) -> int:
    """Run one of the modes that the module describes; return the exit code."""
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
