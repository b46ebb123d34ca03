"""Run functions that tools/bench_data.py measures in new processes: `bench_data_child.py OUT MODULE NAME JSON`."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # from a checkout that is not installed

import psutil

MIB = 1 << 20
# One thread, nothing from the network, and every cache in a folder of this run: litdata empties its cache at its start.
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_OFFLINE": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
CACHES = ("DATA_OPTIMIZER_CACHE_FOLDER", "DATA_OPTIMIZER_DATA_CACHE_FOLDER", "HF_HOME", "HOME", "TMPDIR")
_POLL_SECONDS = 0.1


class NotMeasuredError(Exception):
    """The reason why there is no figure."""


def missing(*packages: str) -> None:
    """Raise NotMeasuredError if one of these is not installed."""
    if absent := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise NotMeasuredError(f"{', '.join(absent)} not installed")


def cpu_seconds() -> float:
    """Return the CPU seconds so far of this process, of its children that have ended and of those that live."""
    spent = [resource.getrusage(which) for which in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    living = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(one.ru_utime + one.ru_stime for one in spent) + sum(one.user + one.system for one in living)


def memory(pids: list[int]) -> float:
    """Return the MiB of processes and their children, where n that share a page have 1/n of it each (PSS)."""
    found = 0.0
    for pid in pids:
        try:
            family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
            found += sum(one.memory_full_info().pss for one in family if one.status() != psutil.STATUS_ZOMBIE)
        except (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError, FileNotFoundError):
            continue  # it has ended
    return found / MIB


def measured(
    function: Callable[..., dict[str, Any]],
    folder: Path,
    *,
    ranks: int = 1,
    seconds: float = 300,
    most_mib: float = float("inf"),
    **arguments: Any,
) -> tuple[list[dict[str, Any]], float]:
    """Run `function` in each of `ranks` new processes; return its results and the most memory of all together in MiB.

    Memory is sampled every 0.1 s or more.
    NotMeasuredError: a process failed, or they took more than `seconds` or `most_mib`.
    """
    for name in CACHES:
        (folder / "own" / name).mkdir(parents=True, exist_ok=True)
    outs = [folder / f"out-{rank}.json" for rank in range(ranks)]
    processes, most = [], 0.0
    ends = time.monotonic() + seconds
    with (folder / "log.txt").open("wb") as log:
        try:
            for rank, out in enumerate(outs):
                out.unlink(missing_ok=True)
                module = Path(sys.modules[function.__module__].__file__ or "").stem
                words = [sys.executable, __file__, str(out), module, function.__name__, json.dumps(arguments)]
                own = {name: str(folder / "own" / name) for name in CACHES}
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
                environment = os.environ | ENVIRONMENT | own | {name: str(value) for name, value in place.items()}
                how: dict[str, Any] = {"env": environment, "stdout": log, "stderr": log, "start_new_session": True}
                processes.append(subprocess.Popen(words, stdin=subprocess.DEVNULL, cwd=folder, **how))
            while any(process.poll() is None for process in processes):
                if any(process.poll() for process in processes):
                    break
                if ranks > 1 or most_mib < float("inf"):
                    most = max(most, memory([process.pid for process in processes]))
                if most > most_mib:
                    raise NotMeasuredError(f"ended at {most:,.0f} MiB")
                if time.monotonic() > ends:
                    raise NotMeasuredError(f"ended after {seconds:g} s")
                time.sleep(_POLL_SECONDS)
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if not all(out.is_file() for out in outs) or any(process.returncode for process in processes):
        said = (folder / "log.txt").read_text(errors="replace").strip().splitlines() or ["it failed"]
        print(*said[-20:], sep="\n", file=sys.stderr)
        raise NotMeasuredError(f"failed: {said[-1][:160]}")
    return [json.loads(out.read_text()) for out in outs], most


def main() -> None:
    out, module, name, arguments = sys.argv[1:]
    found = getattr(importlib.import_module(f"tools.{module}"), name)(**json.loads(arguments))
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
