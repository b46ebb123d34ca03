"""Ranks that are traced each in a process of its own, for what they change in PyTorch and DeepSpeed."""

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
    """Return the trace of each job, as many at a time as there are cores.

    device: "cuda" or "cpu", what the fake devices are taken for; done: is called after each.
    ValueError: the recipe cannot run so; OSError: the fake GPU cannot be built, or a process of a rank was killed;
    RuntimeError: anything else that a rank raised.
    """
    with _lock:
        server = _servers.get(device)
        if server is None or not server.is_alive:
            server = _servers[device] = _Server(device)
        return server.trace(jobs, hardware, done)


class _Server:
    """`bd3_scale.plan.server`, which lives until this process ends; DeepSpeed is told of the device at its import."""

    def __init__(self, device: str) -> None:
        ours, theirs = socket.socketpair()
        # What is imported here is found there, plug-ins above all.
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
        numbers = {next(_numbers): place for place, _ in enumerate(jobs)}
        found: list[Any] = [None] * len(jobs)
        try:
            for number, place in numbers.items():
                self._connection.send((number, jobs[place], hardware))
            while numbers:
                number, outcome = self._connection.recv()
                if number not in numbers:
                    # Of a call before, which did not wait for all.
                    continue
                if isinstance(outcome, Exception):
                    raise outcome
                found[numbers.pop(number)] = outcome
                done()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise ChildProcessError(
                f"the process that ranks are forked from ended with {self._process.wait()}: is there enough memory?"
            ) from None
        finally:
            if numbers and self.is_alive:
                self._connection.send(None)
        return found
