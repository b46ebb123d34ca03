"""Ranks that are traced each in a process of its own, for what they change in PyTorch and DeepSpeed."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from bd3_scale.plan.hardware import Hardware

if TYPE_CHECKING:
    from bd3_scale.plan.job import Job
    from bd3_scale.plan.trace import Trace


def trace_all(
    jobs: Sequence[Job], hardware: Hardware, *, device: str, done: Callable[[], None] = lambda: None
) -> list[Trace]:
    """Return the trace of each job, as many at a time as there are cores.

    device: "cuda" or "cpu", what the fake devices are taken for; done: is called after each.
    ValueError: the recipe cannot run so; OSError: the fake GPU cannot be built, or a process of a rank was killed;
    RuntimeError: anything else that a rank raised.
    """
    context = multiprocessing.get_context("forkserver")
    # It imports once what takes seconds, and has no threads that a fork would cut off.
    context.set_forkserver_preload(["bd3_scale.plan.preload"])

    def apart(job: Job) -> Trace:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_trace, args=(sender, job, hardware, device), daemon=True)
        process.start()
        sender.close()
        try:
            outcome = receiver.recv()
        except EOFError:
            process.join()
            killed = ": it was killed, maybe for want of memory" if process.exitcode == -signal.SIGKILL else ""
            raise ChildProcessError(f"the process of rank {job.rank} ended with {process.exitcode}{killed}") from None
        process.join()
        done()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        return list(threads.map(apart, jobs))


def _trace(sender: Connection, job: Job, hardware: Hardware, device: str) -> None:
    os.environ |= {"RANK": str(job.rank), "WORLD_SIZE": str(job.world_size), "LOCAL_RANK": "0"}
    os.environ |= {"LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "DS_ACCELERATOR": device}
    if not os.environ.get("BD3_DEBUG"):
        _be_quiet()
    try:
        sender.send(_traced(job, hardware, device))
    except Exception as error:
        if os.environ.get("BD3_DEBUG"):
            raise
        kind = next((kind for kind in (ValueError, OSError) if isinstance(error, kind)), RuntimeError)
        sender.send(kind(f"rank {job.rank} of {job.world_size}: {type(error).__name__}: {error}"))


def _traced(job: Job, hardware: Hardware, device: str) -> Trace:
    import torch

    from bd3_scale.parallel import megatron_on_cpu
    from bd3_scale.plan import fake_gpu
    from bd3_scale.plan.rank import trace_rank
    from bd3_scale.registry import import_plugins

    import_plugins(job.recipe.plugins)
    torch.set_num_threads(1)
    if device == "cuda":
        fake_gpu.install(hardware.device, hardware.memory_bytes)
    else:
        fake_gpu.install_without_gpu()
        megatron_on_cpu.install()
    return trace_rank(job, torch.device(device, 0) if device == "cuda" else torch.device(device))


def _be_quiet() -> None:
    """Keep to ourselves what libraries say of a GPU that is not there."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
