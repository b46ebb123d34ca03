"""Start programs as forks of a server that has every import done, which is faster than a new interpreter.

`run` and `Program` take a command line as `subprocess` does, and `run_ranks` takes a function. Programs that a forked
program starts, such as the ranks of `bd3-scale train`, are forks of it. All else is real: process ids, signals, exit
codes, output, environment. Use `subprocess` to test how a command itself starts.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.support.programs import BD3_SCALE, become, torch_threads

ROOT = Path(__file__).parents[2]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.support.preloaded"])


def run(
    command: Sequence[object],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 200,
) -> subprocess.CompletedProcess[str]:
    """Run `bd3-scale` or a Python program, as `subprocess.run(..., capture_output=True, text=True)` does."""
    program = Program(command, cwd=cwd, env=env)
    try:
        stdout, stderr = program.communicate(timeout)
    finally:
        program.end()
    return subprocess.CompletedProcess(program.command, program.returncode, stdout, stderr)


def bd3_scale(*arguments: object, cwd: Path, env: Mapping[str, str] | None = None, returncode: int = 0) -> str:
    """Run a command, check its exit code, and return its stdout, or its stderr where it fails."""
    done = run([BD3_SCALE, *arguments], cwd=cwd, env=env)
    assert done.returncode == returncode, done.stdout + done.stderr
    return done.stderr if returncode else done.stdout


class Program:
    """A running program, with as much of the interface of `subprocess.Popen` as tests need; its output is in files."""

    def __init__(
        self, command: Sequence[object], *, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> None:
        self.command = [str(word) for word in command]
        self._folder = TemporaryDirectory(prefix="bd3_scale-output-")
        files = [str(Path(self._folder.name, name)) for name in ("stdout", "stderr")]
        _start_server()
        environment = dict(os.environ if env is None else env)
        self._process = _CONTEXT.Process(
            target=_program, args=(self.command, str(cwd or Path.cwd()), environment, files)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def output(self) -> str:
        """Return all that the program has printed until now."""
        return "".join(Path(self._folder.name, name).read_text() for name in ("stdout", "stderr"))

    def wait(self, timeout: float = 100) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.command, timeout, self.output())
        return self.returncode

    def communicate(self, timeout: float = 100) -> tuple[str, str]:
        self.wait(timeout)
        stdout, stderr = (Path(self._folder.name, name).read_text() for name in ("stdout", "stderr"))
        return stdout, stderr

    def end(self) -> None:
        """Kill the program with all that it started, if it still runs, and delete its output."""
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.killpg(self.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self._folder.cleanup()


def _program(command: list[str], cwd: str, environment: dict[str, str], files: list[str]) -> None:
    assert "tests.support.preloaded" in sys.modules, "the server passes over what it cannot import"
    os.setsid()
    output = [os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) for file in files]
    become(command, cwd=cwd, env=environment, fds=[os.open(os.devnull, os.O_RDONLY), *output])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_ranks(target: Callable[..., None], world_size: int, *args: object, logs: Path, timeout: float = 90) -> None:
    """Run `target(*args)` on `world_size` ranks, and fail with the output of those that failed, the first one first."""
    _start_server()
    logs.mkdir(parents=True, exist_ok=True)
    environment = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
    environment |= {
        "BD3_SCALE_SECRET": str(logs.absolute() / "secret"),
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    files = [logs / f"rank{rank}.log" for rank in range(world_size)]
    ranks = [
        _CONTEXT.Process(target=_rank, args=(target, args, environment, rank, file, timeout))
        for rank, file in enumerate(files)
    ]
    for rank in ranks:
        rank.start()
    deadline = time.monotonic() + timeout
    try:
        while any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks):
            time.sleep(0.02)
            if time.monotonic() > deadline + 5:  # the ranks print where they are, and end
                break
        failed = [i for i, rank in enumerate(ranks) if rank.exitcode is None or rank.exitcode]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    order = sorted(failed, key=lambda i: ranks[i].exitcode != 1)
    assert not failed, "\n".join(f"rank {i} ({ranks[i].exitcode}):\n{files[i].read_text()[-4000:]}" for i in order)


def _rank(
    target: Callable[..., None], args: tuple, environment: dict[str, str], rank: int, log: Path, timeout: float
) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    faulthandler.dump_traceback_later(timeout, exit=True)
    torch_threads()
    multiprocessing.set_start_method(None, force=True)  # "forkserver" would start a server for each rank
    target(*args)


def _start_server() -> None:
    """Start the server; Python 3.11's does not inherit `sys.path`, and skips what it then cannot import."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([before] if before else [])])
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
