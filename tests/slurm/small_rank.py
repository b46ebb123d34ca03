"""Run a rank that writes heartbeats (`bd3_scale.resilience.heartbeat`) and trains nothing, to test the supervisor.

    python small_rank.py RUN STEPS SECONDS [FAULT:RANK:STEP]

A fault strikes in the first attempt alone, `crash-always` in each. A checkpoint is written every 5 steps by rank 0,
unless the fault is `crash-always`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path


def main(run: Path, steps: int, seconds: float, fault: str = "none:0:0") -> None:
    rank = int(os.environ["RANK"])
    kind, at_rank, at_step = fault.split(":")
    checkpoint = run / "checkpoint"
    saved = int(checkpoint.read_text()) if checkpoint.exists() else 0
    first = not (run / "slurm/attempts.jsonl").exists()
    (run / f"pid{rank}").write_text(str(os.getpid()))
    tell(rank, "start", saved, saved, 0)
    if kind == "slow-start":
        time.sleep(4)
    asked = []
    for name in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(name, lambda number, _: asked.append(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1, signal.SIGTERM})
    for step in range(saved + 1, steps + 1):
        time.sleep(seconds)
        if rank == int(at_rank) and step == int(at_step) and (first or kind == "crash-always"):
            if kind.startswith("crash"):
                tell(rank, "failed", step - 1, saved, step, error="RuntimeError: injected", time=time.time())
                raise RuntimeError("injected crash")
            if kind == "mistake":
                sys.exit(2)
        if (step % 5 == 0 or asked) and kind != "crash-always":
            saved = step
            if rank == 0:
                checkpoint.write_text(str(step))
        tell(rank, "step", step, saved, step)
        if asked:
            tell(rank, "stopped", step, saved, step + 1)
            return
    tell(rank, "done", steps, steps, steps + 1)


def tell(rank: int, phase: str, step: int, saved: int, beat: int, **more: object) -> None:
    path = Path(os.environ["BD3_SCALE_HEARTBEATS"], f"rank{rank}.json")
    aside = path.with_suffix(".new")
    aside.write_text(json.dumps({"phase": phase, "step": step, "saved": saved, "beat": beat} | more))
    aside.replace(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), *sys.argv[4:])
