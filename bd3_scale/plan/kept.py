"""Traces kept on disk: what a rank asks of its device changes with the code, its libraries and the job alone."""

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
# Of this room, what works on traces and makes none.
_BESIDE_TRACES = {
    f"plan/{name}.py" for name in ("calibrate", "commands", "forecast", "samples", "search", "show", "stages", "timing")
}
# Of a recipe, what a step does not read.
_BESIDE_STEPS = {"name", "run_dir", "init_from", "evaluation", "checkpoint", "logging", "launch"}


def folder() -> Path:
    """Return where traces are kept; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bd3_scale" / "plan"


def traces_of(
    jobs: Sequence[Job], hardware: Hardware, *, device: str, done: Callable[[], None] = lambda: None
) -> list[Trace]:
    """Return what `trace_all` does, without the order of messages; a job that was traced before is read.

    A kept trace that cannot be read is made anew, and one that cannot be written is no error. Plug-ins may change
    without us knowing: jobs with some are neither read nor written.
    """
    paths = [None if job.recipe.plugins else _path(job, hardware, device) for job in jobs]
    found = [None if path is None else _read(path) for path in paths]
    missing = [index for index, trace in enumerate(found) if trace is None]
    for _ in range(len(jobs) - len(missing)):
        done()
    for index, trace in zip(
        missing, trace_all([jobs[index] for index in missing], hardware, device=device, done=done), strict=True
    ):
        found[index] = trace
        if path := paths[index]:
            _write(path, trace)
    return [trace for trace in found if trace is not None]


def _path(job: Job, hardware: Hardware, device: str) -> Path:
    what = {
        "recipe": job.recipe.model_dump(mode="json", exclude=_BESIDE_STEPS),
        "vocabulary": vars(job.vocabulary),
        "job": [job.rank, job.world_size, job.micro_batches, job.steps, job.beyond],
        "whole": job.whole and job.whole.model_dump(mode="json"),
        "device": [device, hardware.device, hardware.memory_bytes],
        "attention": os.environ.get("BD3_SCALE_ATTENTION"),
        "libraries": {name: metadata.version(name) for name in _LIBRARIES},
        "source": _source(),
    }
    return folder() / f"{hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()}.json"


@functools.cache
def _source() -> str:
    """Return a hash of the package's code."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in ("*.py", "*.cpp") for path in _PACKAGE.rglob(pattern)):
        name = path.relative_to(_PACKAGE).as_posix()
        if name not in _BESIDE_TRACES:
            digest.update(f"{name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> Trace | None:
    try:
        kept: dict[str, Any] = read_object(path)
        return Trace(
            segments=[Segment(**each) for each in kept["segments"]],
            work={Key(*key): Work(**work) for key, work in kept["work"]},
            messages={
                Key(*key): Message(
                    tuple(message["ranks"]),
                    message["calls"],
                    message["bytes"],
                    Work(**message["beside"]),
                    Work(**message["alone"]),
                )
                for key, message in kept["messages"]
            },
            **{name: kept[name] for name in ("waits", "micro_batches", "flops", "parameters")},
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _write(path: Path, trace: Trace) -> None:
    kept = {
        "segments": [vars(each) for each in trace.segments],
        "work": [[key, vars(work)] for key, work in trace.work.items()],
        "messages": [
            [key, {**vars(message), "beside": vars(message.beside), "alone": vars(message.alone)}]
            for key, message in trace.messages.items()
        ],
        **{name: getattr(trace, name) for name in ("waits", "micro_batches", "flops", "parameters")},
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(kept))
    except OSError as error:
        tell(f"note: {error}: the next plan traces this again")
