"""Read what a run leaves in its directory, for tests to compare."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file


def records(run: Path) -> list[dict[str, Any]]:
    """Return a run's metrics so far, without a last line that is being written."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def losses(run: Path) -> dict[int, tuple[float, float]]:
    """Return loss and gradient norm of each step; earlier versions wrote them under other names."""
    found = {r["step"]: (r["train_loss"], r["grad_norm"]) for r in records(run) if "train_loss" in r}
    return found | {r["step"]: (r["train/loss"], r["train/grad_norm"]) for r in records(run) if "train/loss" in r}


def nelbos(run: Path) -> dict[int, float]:
    found = {r["step"]: r["nelbo"] for r in records(run) if "nelbo" in r}
    return found | {r["step"]: r["eval/nelbo"] for r in records(run) if "eval/nelbo" in r}


def newest(run: Path) -> int:
    """Return the step of a run's newest checkpoint, 0 where there is none."""
    return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")), default=0)


def tensor_files(run: Path, step: int) -> dict[str, bytes]:
    """Return the bytes of all tensor files of a checkpoint."""
    return {p.name: p.read_bytes() for p in (run / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")}


def tensors(run: Path, step: int) -> dict[str, bytes]:
    """Return the bytes of each tensor of a checkpoint."""
    files = (run / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")
    return {name: value.tobytes() for path in files for name, value in load_file(path).items()}


def wait_for(condition: Callable[[], object], seconds: float = 100) -> None:
    """Wait until `condition` holds; an assertion in it ends the wait."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s"
        time.sleep(0.01)


def rank_pid(launcher: int, rank: int) -> int:
    """Return the process id of a rank that a forked `bd3-scale train` has started."""

    def found() -> list[int]:
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        return [int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text() == f"rank{rank}\n"]

    wait_for(found)
    return found()[0]


def is_alive(pid: int) -> bool:
    """Return whether a process still runs; a zombie, which has no command line, does not."""
    path = Path(f"/proc/{pid}/cmdline")
    return path.exists() and path.read_bytes() != b""
