"""Cache traces on disk: a trace depends on the code, its libraries and the job alone."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from bd3_scale.plan.hardware import Hardware
from bd3_scale.plan.job import Job
from bd3_scale.plan.trace import Key, Message, Segment, Trace, Work
from bd3_scale.plan.workers import trace_all
from bd3_scale.resilience.files import read_object, write_atomically
from bd3_scale.resilience.terminal import tell

_PACKAGE = Path(__file__).parents[1]
_LIBRARIES = ("torch", "megatron-core", "deepspeed")
# Files of this package that use traces and do not influence them.
_NOT_TRACED = {
    f"plan/{name}.py" for name in ("calibrate", "commands", "forecast", "samples", "search", "show", "stages", "timing")
}
# Sections of a recipe that a step does not read.
_NOT_IN_A_STEP = {"name", "run_dir", "init_from", "evaluation", "checkpoint", "logging", "launch"}


def folder() -> Path:
    """Return the folder of the cache; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bd3_scale" / "plan"


def traces_of(
    jobs: Sequence[Job], hardware: Hardware, *, device: str, done: Callable[[], None] = lambda: None
) -> list[Trace]:
    """Return what `trace_all` does, without the order of messages; traces in the cache are read.

    A cached trace that cannot be read is made anew, and one that cannot be written is no error. Jobs with plug-ins are
    neither read nor written, because the code of a plug-in is not part of the key.
    """
    paths = [None if job.recipe.plugins else _path(job, hardware, device) for job in jobs]
    traces = [None if path is None else _read(path) for path in paths]
    missing = [index for index, trace in enumerate(traces) if trace is None]
    for _ in range(len(jobs) - len(missing)):
        done()
    for index, trace in zip(
        missing, trace_all([jobs[index] for index in missing], hardware, device=device, done=done), strict=True
    ):
        traces[index] = trace
        if path := paths[index]:
            _write(path, trace)
    return [trace for trace in traces if trace is not None]


def _path(job: Job, hardware: Hardware, device: str) -> Path:
    key = {
        "recipe": job.recipe.model_dump(mode="json", exclude=_NOT_IN_A_STEP),
        "vocabulary": vars(job.vocabulary),
        "job": [job.rank, job.world_size, job.micro_batches, job.steps, job.beyond],
        "whole": job.whole and job.whole.model_dump(mode="json"),
        "device": [device, hardware.device, hardware.memory_bytes],
        "kernels": [os.environ.get(name) for name in ("BD3_SCALE_ATTENTION", "BD3_SCALE_FUSED")],
        "libraries": {name: metadata.version(name) for name in _LIBRARIES},
        "source": _source(),
    }
    return folder() / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()}.json"


@functools.cache
def _source() -> str:
    """Return a hash of the package's code that a trace depends on."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in ("*.py", "*.cpp") for path in _PACKAGE.rglob(pattern)):
        name = path.relative_to(_PACKAGE).as_posix()
        if name not in _NOT_TRACED:
            digest.update(f"{name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> Trace | None:
    try:
        stored: dict[str, Any] = read_object(path)
        return Trace(
            segments=[Segment(**each) for each in stored["segments"]],
            work={Key(*key): Work(**work) for key, work in stored["work"]},
            messages={
                Key(*key): Message(
                    tuple(message["ranks"]),
                    message["calls"],
                    message["bytes"],
                    Work(**message["overlapped"]),
                    Work(**message["exclusive"]),
                )
                for key, message in stored["messages"]
            },
            **{name: stored[name] for name in ("waits", "micro_batches", "flops", "parameters")},
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _write(path: Path, trace: Trace) -> None:
    stored = {
        "segments": [vars(each) for each in trace.segments],
        "work": [[key, vars(work)] for key, work in trace.work.items()],
        "messages": [
            [key, {**vars(message), "overlapped": vars(message.overlapped), "exclusive": vars(message.exclusive)}]
            for key, message in trace.messages.items()
        ],
        **{name: getattr(trace, name) for name in ("waits", "micro_batches", "flops", "parameters")},
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(stored))
    except OSError as error:
        tell(f"note: {error}: the next plan traces this again")
