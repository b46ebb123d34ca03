"""Trace ranks in processes of their own, because a trace changes PyTorch and DeepSpeed for the whole process."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from bd3_scale.plan.hardware import Hardware

if TYPE_CHECKING:
    from bd3_scale.plan.job import Job
    from bd3_scale.plan.trace import Trace

_numbers = itertools.count()
_lock = threading.Lock()
_servers: dict[str, _Server] = {}


def trace_all(
    jobs: Sequence[Job], hardware: Hardware, *, device: str, done: Callable[[], None] = lambda: None
) -> list[Trace]:
    """Return the trace of each job; as many jobs run at a time as there are cores.

    device: "cuda" or "cpu", the type of the fake devices; done: is called after each trace.
    ValueError: the recipe cannot run so; OSError: the fake GPU cannot be compiled, or the process of a rank was killed;
    RuntimeError: anything else that a rank raised.
    """
    with _lock:
        server = _servers.get(device)
        if server is None or not server.is_alive:
            server = _servers[device] = _Server(device)
        return server.trace(jobs, hardware, done)


class _Server:
    """The process of `bd3_scale.plan.server`, which lives until this process ends.

    There is one for each type of device, since DeepSpeed chooses its device when it is imported.
    """

    def __init__(self, device: str) -> None:
        ours, theirs = socket.socketpair()
        # The server must find the modules that this process finds, plug-ins above all.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        environment |= {"DS_ACCELERATOR": device}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bd3_scale.plan.server", device, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
            )
        self._connection = Connection(ours.detach())

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def trace(self, jobs: Sequence[Job], hardware: Hardware, done: Callable[[], None]) -> list[Trace]:
        numbers = {next(_numbers): index for index, _ in enumerate(jobs)}
        traces: list[Any] = [None] * len(jobs)
        try:
            for number, index in numbers.items():
                self._connection.send((number, jobs[index], hardware))
            while numbers:
                number, outcome = self._connection.recv()
                if number not in numbers:
                    # An answer to an earlier call, which ended before it had all its answers.
                    continue
                if isinstance(outcome, Exception):
                    raise outcome
                traces[numbers.pop(number)] = outcome
                done()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise ChildProcessError(
                f"the process that ranks are forked from ended with {self._process.wait()}: is there enough memory?"
            ) from None
        finally:
            if numbers and self.is_alive:
                self._connection.send(None)
        return traces
