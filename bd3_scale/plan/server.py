"""Serve traces of ranks, each from a process forked from this one, which imports once what takes seconds.

    python -m bd3_scale.plan.server cuda|cpu FD

A trace changes PyTorch and DeepSpeed for good, so each needs a process of its own; forked ones need no imports.

The descriptor is a socket. A request is (number, job, hardware), an answer (number, trace or exception). A request None
drops the jobs that have not begun. When the socket is closed the server and its ranks end.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import warnings
from collections import deque
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from bd3_scale.observe.libraries import quieten_libraries

quieten_libraries()

# isort: split
import torch  # noqa: E402
import torch._inductor.compile_fx  # noqa: E402

from bd3_scale.parallel import megatron_on_cpu  # noqa: E402
from bd3_scale.plan import fake_gpu  # noqa: E402
from bd3_scale.plan.hardware import Hardware  # noqa: E402
from bd3_scale.plan.job import Job  # noqa: E402
from bd3_scale.plan.rank import trace_rank  # noqa: E402
from bd3_scale.plan.trace import Trace  # noqa: E402
from bd3_scale.registry import import_plugins  # noqa: E402

Request = tuple[int, Job, Hardware]


def main() -> None:
    """Serve until the other end of the socket is closed; ranks that still run are killed then."""
    # Ctrl-C goes to the whole process group. The client handles it, and its end closes the socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    device, requests = sys.argv[1], Connection(int(sys.argv[2]))
    waiting: deque[Request] = deque()
    running: dict[Connection, tuple[int, Job, BaseProcess]] = {}
    cores = len(os.sched_getaffinity(0))
    while True:
        for ready in wait([requests, *running]):
            assert isinstance(ready, Connection)
            if ready is not requests:
                number, outcome = _ended(ready, *running.pop(ready))
                requests.send((number, outcome))
                continue
            try:
                request: Any = requests.recv()
            except EOFError:
                for _, _, process in running.values():
                    process.kill()
                return
            if request is None:
                waiting.clear()
            else:
                waiting.append(request)
        while waiting and len(running) < cores:
            number, job, hardware = waiting.popleft()
            receiver, process = _start(job, hardware, device)
            running[receiver] = number, job, process


def _start(job: Job, hardware: Hardware, device: str) -> tuple[Connection, BaseProcess]:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_trace, args=(sender, job, hardware, device), daemon=True)
    process.start()
    sender.close()
    return receiver, process


def _ended(receiver: Connection, number: int, job: Job, process: BaseProcess) -> tuple[int, Trace | Exception]:
    try:
        outcome: Trace | Exception = receiver.recv()
        process.join()
    except EOFError:
        process.join()
        killed = ": it was killed, maybe because memory ran out" if process.exitcode == -signal.SIGKILL else ""
        outcome = ChildProcessError(f"the process of rank {job.rank} ended with {process.exitcode}{killed}")
    receiver.close()
    return number, outcome


def _trace(sender: Connection, job: Job, hardware: Hardware, device: str) -> None:
    os.environ |= {"RANK": str(job.rank), "WORLD_SIZE": str(job.world_size), "LOCAL_RANK": "0"}
    os.environ |= {"LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    if not os.environ.get("BD3_DEBUG"):
        _silence_libraries()
    try:
        sender.send(trace_here(job, hardware, device))
    except Exception as error:
        if os.environ.get("BD3_DEBUG"):
            raise
        kind = next((kind for kind in (ValueError, OSError) if isinstance(error, kind)), RuntimeError)
        sender.send(kind(f"rank {job.rank} of {job.world_size}: {type(error).__name__}: {error}"))


def trace_here(job: Job, hardware: Hardware, device: str) -> Trace:
    """Trace a job in this process; its PyTorch and DeepSpeed cannot be used for anything else afterwards."""
    import_plugins(job.recipe.plugins)
    torch.set_num_threads(1)
    if device == "cuda":
        fake_gpu.install(hardware.device, hardware.memory_bytes)
        return trace_rank(job, torch.device("cuda", 0))
    fake_gpu.install_without_gpu()
    megatron_on_cpu.install()
    return trace_rank(job, torch.device("cpu"))


def _silence_libraries() -> None:
    """Hide what libraries print about a GPU that does not exist."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


if __name__ == "__main__":
    main()
