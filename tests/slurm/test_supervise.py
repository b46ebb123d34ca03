"""The supervisor on a real SLURM, with ranks that speak its heartbeat and train nothing. Each test of SLURM may
run beside the others, on a SLURM of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.jobs import attempts, logs, small_job, write_workplace
from tests.support.programs import BD3_SCALE

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, topics):
    folder = tmp_path_factory.mktemp("supervised")
    write_workplace(folder, topics)
    return folder


class Run:
    """A submitted job of small ranks."""

    def __init__(self, cluster, workplace, name, *arguments, hold=False, **options):
        self.cluster, self.folder = cluster, workplace / name
        self.job = small_job(workplace, name, *arguments, **options)
        if not hold:
            self.submit()

    def submit(self):
        self.ids = [self.sbatch() for _ in range(max(1, self.job.chain))]
        (self.job.folder / "submitted.json").write_text(json.dumps({"jobs": self.ids}))

    def sbatch(self):
        done = self.cluster.run("sbatch", "--parsable", self.job.folder / "job.sh")
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def step(self, rank=0):
        path = self.job.folder / "heartbeats" / f"rank{rank}.json"
        return json.loads(path.read_text())["step"] if path.exists() else -1

    def wait_for(self, condition, what, seconds=60):
        try:
            self.cluster.wait(condition, seconds, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{attempts(self.folder)}\n{logs(self.folder)}") from None

    def wait_for_step(self, step, rank=0):
        self.wait_for(lambda: self.step(rank) >= step, f"step {step}")

    def outcomes(self, count=None, seconds=90):
        """Return the outcomes of all attempts, once there are `count`, or one is final."""
        final = ("done", "failed", "stopped", "cancelled")
        self.wait_for(
            lambda: len(attempts(self.folder)) == count or any(a["outcome"] in final for a in attempts(self.folder)),
            "an end",
            seconds,
        )
        return [a["outcome"] for a in attempts(self.folder)]

    def state(self):
        return (
            self.cluster.run("scontrol", "show", "job", self.ids[-1], "--oneliner")
            .stdout.split("JobState=")[1]
            .split()[0]
        )


def bd3_scale(cluster, *arguments):
    return subprocess.run(
        [BD3_SCALE, *map(str, arguments)], env=cluster.env, capture_output=True, text=True, timeout=60, check=False
    )


def test_a_crash_goes_on_from_the_last_checkpoint(cluster, workplace):
    run = Run(cluster, workplace, "crash", 40, 0.1, "crash:1:8")
    assert run.outcomes() == ["requeued", "done"]
    first, second = attempts(run.folder)
    assert first["failure"]
    assert first["reason"].startswith("rank 1: exit code 1, RuntimeError: injected")
    # The rank that is left has no peer that it would miss, and saves when srun ends it.
    assert first["from_step"] == 0
    assert second["step"] == 40 > second["from_step"] == first["saved"] >= 5
    said = logs(run.folder)
    assert 'raise RuntimeError("injected crash")' in (run.folder / "logs" / f"job-{run.ids[0]}.log").read_text(), said


def test_a_kill_that_slurm_repeats_hits_no_later_attempt(cluster, workplace):
    """Check it with a node too slow to answer: SLURM repeats the kill a minute later, after the requeue."""
    run = Run(cluster, workplace, "repeated", 150, 0.5, "crash:1:8")
    run.wait_for_step(6)
    node = json.loads((run.job.folder / "current.json").read_text())["nodes"][0]
    slurmd = int((cluster.folder / f"run/slurmd-{node}.pid").read_text())
    controller = cluster.folder / "log/slurmctld.log"
    before = controller.read_text().count("timed out")
    os.kill(slurmd, signal.SIGSTOP)
    try:
        run.wait_for(lambda: controller.read_text().count("timed out") > before, "a kill that was not answered", 20)
    finally:
        os.kill(slurmd, signal.SIGCONT)
    asked = time.time()
    assert run.outcomes() == ["requeued", "done"]
    assert attempts(run.folder)[1]["ended"] > asked + 62


def test_crashes_without_a_newer_checkpoint_give_up(cluster, workplace):
    run = Run(cluster, workplace, "hopeless", 9, 0.05, "crash-always:1:3", max_failures=2)
    assert run.outcomes() == ["requeued", "failed"]
    assert "2 attempts failed without a newer checkpoint" in attempts(run.folder)[-1]["reason"]
    run.wait_for(lambda: run.state() == "FAILED", "the job to fail")


def test_a_mistake_of_a_person_is_not_tried_again(cluster, workplace):
    run = Run(cluster, workplace, "mistake", 9, 0.05, "mistake:1:3")
    assert run.outcomes() == ["failed"]
    assert "rank 1: exit code 2" in attempts(run.folder)[0]["reason"]


def process_of(run, mode):
    """Return the pid of the supervisor (`job`) of a run, or of its batch process (`keep`)."""
    wanted = [mode.encode(), os.fsencode(run.job.folder / "job.json")]
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cmdline").read_bytes().split(b"\0")[-3:-1] == wanted:
                found.append(int(process.name))
    (one,) = found
    return one


def test_a_supervisor_that_is_killed_outright_is_told_and_the_run_goes_on(cluster, workplace):
    run = Run(cluster, workplace, "outright", 120, 0.2)
    run.wait_for_step(6)
    os.kill(process_of(run, "job"), signal.SIGKILL)
    run.wait_for(lambda: attempts(run.folder), "its line")
    first = attempts(run.folder)[0]
    assert (first["outcome"], first["reason"]) == ("requeued", "the supervisor was killed by SIGKILL")
    assert first["failure"]
    run.wait_for(lambda: (run.job.folder / "heartbeats").resolve().name == "heartbeats-1", "another life")
    run.wait_for_step(first["saved"] + 2)
    # The batch process itself: SLURM ends the job, and the supervisor, if it lives long enough, or else whoever asks
    # next, writes its line.
    os.kill(process_of(run, "keep"), signal.SIGKILL)
    run.wait_for(lambda: run.state() == "FAILED", "the end of the job")
    status = json.loads(bd3_scale(cluster, "status", run.folder, "--json").stdout)
    assert (status["state"], status["step"]) == ("lost", attempts(run.folder)[1]["step"])
    second = attempts(run.folder)[1]
    assert second["reason"].startswith("the batch process was killed")
    assert second["failure"]
    assert second["step"] > first["saved"]
    assert json.loads(bd3_scale(cluster, "status", run.folder, "--json").stdout)["attempts"] == attempts(run.folder)
    assert "submitted again as job" in bd3_scale(cluster, "requeue", run.folder).stdout
    assert run.outcomes() == ["requeued", "lost", "done"]
    assert attempts(run.folder)[2]["from_step"] == second["saved"]


def test_a_job_that_is_cancelled_leaves_its_line_wherever_it_was(cluster, workplace):
    run = Run(cluster, workplace, "gone", 600, 0.2, hold=True)

    def cancel():
        cluster.run("scancel", run.ids[0])
        run.wait_for(lambda: run.state() == "CANCELLED", "CANCELLED")

    def again(*options):
        told = json.loads((run.job.folder / "job.json").read_text())
        (run.job.folder / "job.json").write_text(json.dumps(told | {"submission": str(len(attempts(run.folder)))}))
        run.ids = [cluster.run("sbatch", "--parsable", *options, run.job.folder / "job.sh").stdout.strip()]
        (run.job.folder / "submitted.json").write_text(json.dumps({"jobs": run.ids}))

    # In the queue: whoever asks next writes it, once.
    again("--hold")
    cancel()
    for _ in range(2):
        assert json.loads(bd3_scale(cluster, "status", run.folder, "--json").stdout)["state"] == "cancelled"
    assert [(a["outcome"], a["reason"]) for a in attempts(run.folder)] == [
        ("cancelled", "scancel, before the ranks started")
    ]
    # While the ranks start, and while ranks that take no signal run on until SLURM kills them: at once.
    python, told = workplace / "deaf-python", json.loads((run.job.folder / "job.json").read_text())
    starts = f"touch {run.folder}/started\nsleep 1.5"
    for count, body in enumerate((starts, f"trap '' TERM\ntouch {run.folder}/started\nsleep 60 & sleep 60"), 2):
        python.write_text(f'#!/bin/bash\n{body}\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        (run.job.folder / "job.json").write_text(json.dumps(told | {"rank_python": str(python)}))
        (run.folder / "started").unlink(missing_ok=True)
        again()
        run.wait_for(lambda: (run.folder / "started").exists(), "a task")
        cancel()
        assert [(a["attempt"], a["outcome"], a["reason"]) for a in attempts(run.folder)[1:]] == [
            (number, "cancelled", "scancel") for number in range(1, count)
        ], logs(run.folder)
    assert not (run.job.folder / "current.json").exists()


def test_scancel_is_final_and_requeue_takes_the_run_up_again(cluster, workplace):
    odd = "c a%u%%\"d'$HOME`id`#é"
    run = Run(cluster, workplace, odd, 600, 0.2)
    run.wait_for_step(3)
    status = json.loads(bd3_scale(cluster, "status", run.folder, "--json").stdout)
    assert (status["state"], status["ranks"]) == ("running", {"step": 2})
    refused = bd3_scale(cluster, "requeue", run.folder.parent)
    assert refused.returncode == 2
    assert "was not submitted" in refused.stderr
    cluster.run("scancel", run.ids[0])
    assert run.outcomes() == ["cancelled"]
    run.wait_for(lambda: run.state() == "CANCELLED", "CANCELLED")
    # Nothing lies elsewhere: SLURM read neither spaces nor patterns nor quotes into the name.
    assert sorted(str(path.relative_to(run.folder)) for path in run.folder.rglob("*.log")) == [
        *(f"logs/attempt-0/rank{rank}.log" for rank in range(2)),
        f"logs/job-{run.ids[0]}.log",
    ]
    assert run.job.folder.stat().st_mode & 0o777 == 0o700
    reached = attempts(run.folder)[0]["saved"]
    assert "submitted again as job" in bd3_scale(cluster, "requeue", run.folder).stdout
    run.wait_for(lambda: (run.job.folder / "current.json").exists() and run.step() > reached, "going on")
    refused = bd3_scale(
        cluster,
        "submit",
        workplace / "recipe.yaml",
        "--profile",
        workplace / f"{odd}.site.yaml",
        "--nodes",
        2,
        "parallel.tensor=1",
        f"run_dir={json.dumps(str(run.folder))}",
        f"data.path={workplace / 'data'}",
    )
    assert refused.returncode == 2
    assert "has a job already" in refused.stderr
    # Asked to stop, it saves and stays stopped.
    assert "saves and stops" in bd3_scale(cluster, "stop", run.folder).stdout
    run.wait_for(lambda: len(attempts(run.folder)) == 2, "a stop")
    last = attempts(run.folder)[-1]
    assert (last["outcome"], last["reason"], last["saved"]) == ("stopped", "bd3-scale stop", last["step"])


def test_usr1_before_the_ranks_are_ready_is_not_lost(cluster, workplace):
    run = Run(cluster, workplace, "early", 12, 0.1, "slow-start:0:0", hold=True)
    # A loaded node is slow to start Python, and nothing of ours can hold a signal until it has.
    slow = workplace / "slow-python"
    slow.write_text(f'#!/bin/bash\ntouch {run.folder}/started\nsleep 3\nexec {sys.executable} "$@"\n')
    slow.chmod(0o755)
    told = json.loads((run.job.folder / "job.json").read_text())
    (run.job.folder / "job.json").write_text(json.dumps(told | {"rank_python": str(slow)}))
    run.submit()
    run.wait_for(lambda: (run.folder / "started").exists(), "a task")
    cluster.run("scancel", "--batch", "--signal=USR1", run.ids[0])
    assert run.outcomes() == ["requeued", "done"]
    first = attempts(run.folder)[0]
    assert (first["saved"], first["failure"], first["signals"]) == (1, False, ["SIGUSR1"])


def test_the_time_limit_is_met_saved(cluster, workplace):
    """Check SLURM's own warning before a limit of a minute: two attempts do what one had no time for."""
    run = Run(cluster, workplace, "limit", 250, 0.2, nodes=1, time_limit="1:00", warning_seconds=20)
    assert run.outcomes(1, seconds=100) == ["requeued"]
    first = attempts(run.folder)[0]
    assert (first["reason"], first["failure"], first["signals"]) == ("time limit", False, ["SIGUSR1"])
    assert first["saved"] == first["step"] > 0
    cluster.run("scancel", run.ids[0])


def test_preemption_saves_and_goes_on_later(cluster, workplace):
    run = Run(cluster, workplace, "preempted", 40, 0.2, nodes=4, exclusive=True)
    run.wait_for_step(3)
    urgent = cluster.run(
        "sbatch", "--parsable", "--partition=high", "--exclusive", "--nodes=4", "--output=/dev/null", "--wrap=sleep 3"
    ).stdout.strip()
    assert urgent
    assert run.outcomes() == ["requeued", "done"]
    first, second = attempts(run.folder)
    assert not first["failure"]
    assert first["saved"] == first["step"] == second["from_step"] >= 3


def test_a_chain_goes_on_where_requeueing_is_forbidden(cluster, workplace):
    run = Run(cluster, workplace, "chain", 30, 0.1, chain=3)
    run.wait_for_step(3)
    assert "#SBATCH --no-requeue" in (run.job.folder / "job.sh").read_text()
    cluster.run("scancel", "--batch", "--signal=USR1", run.ids[0])
    assert run.outcomes() == ["requeued", "done"]
    assert [a["job_id"] for a in attempts(run.folder)] == run.ids[:2]
    log = run.folder / "logs" / f"job-{run.ids[2]}.log"
    run.wait_for(lambda: log.exists() and "nothing to do: the run is done" in log.read_text(), "the last of the chain")


def test_a_bad_node_is_excluded_by_preflight(cluster, workplace):
    """Check that the run moves to other nodes if n1 lacks its scratch folder, and that n1 stays excluded."""
    for node in (2, 3, 4):
        (workplace / f"scratch-n{node}").mkdir()
    check = 'exec "$0" -m bd3_scale.launch.preflight --scratch "$1-$SLURMD_NODENAME" "${@:2}"'
    run = Run(cluster, workplace, "preflight", 6, 0.1, hold=True)
    told = json.loads((run.job.folder / "job.json").read_text())
    told["preflight"] = ["bash", "-c", check, sys.executable, str(workplace / "scratch")]
    (run.job.folder / "job.json").write_text(json.dumps(told))
    run.submit()
    assert run.outcomes() == ["requeued", "done"]
    first, second = attempts(run.folder)
    assert "preflight: n1: " in first["reason"]
    assert "n1" in first["nodes"]
    assert "n1" not in second["nodes"]
    assert (run.job.folder / "exclude.txt").read_text() == "n1\n"


def test_a_hang_is_named_dumped_and_requeued(cluster, workplace):
    deadlines = {"start": 20, "step": 6, "checkpoint": 20, "evaluation": 20}
    run = Run(cluster, workplace, "hang", 60, 0.1, deadlines=deadlines)
    run.wait_for_step(6, rank=1)
    os.kill(int((run.folder / "pid1").read_text()), signal.SIGSTOP)
    assert run.outcomes() == ["requeued", "done"]
    reason = attempts(run.folder)[0]["reason"]
    assert reason.startswith("hang in phase 'step' after 6 s: lowest step ")
    assert "at ranks [1]" in reason
    assert "ranks [1] do not run" in reason


def test_a_dead_slurmd_moves_the_job_to_other_nodes(cluster, workplace):
    run = Run(cluster, workplace, "dead-node", 200, 0.2)
    run.wait_for_step(6)
    nodes = json.loads((run.job.folder / "current.json").read_text())["nodes"]
    number = int(nodes[1].lstrip("n"))
    cluster.dev("kill-node", number)
    try:
        assert run.outcomes(seconds=120)[-1] == "done"
        assert nodes[1] not in attempts(run.folder)[-1]["nodes"]
        assert not any(a["failure"] for a in attempts(run.folder)), f"{attempts(run.folder)}\n{logs(run.folder)}"
    finally:
        cluster.dev("start-node", number)
