"""Starts the processes of a run on this machine and keeps them together until the last has ended."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import NamedTuple

from bd3_scale.launch.watch import Watch
from bd3_scale.resilience.heartbeat import FOLDER_VARIABLE
from bd3_scale.resilience.leftovers import temporary_folder
from bd3_scale.resilience.secret import RENDEZVOUS_VARIABLE
from bd3_scale.resilience.signals import stop_signals
from bd3_scale.resilience.terminal import tell

# What the ranks of a failed run get between SIGTERM and SIGKILL; nothing they could still save would be consistent.
GRACE_SECONDS = 10.0
# The exit code of a run whose ranks hung: it may well go on from its last checkpoint (sysexits.h, EX_TEMPFAIL).
HANG = 75

_WATCH_SECONDS = 1.0
_STACK_SECONDS = 1.5
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)

Rank = subprocess.Popen[bytes]
Events = SimpleQueue["signal.Signals | Rank"]


def launch(
    argv: Sequence[str],
    processes: int,
    threads: int,
    log_dir: Path | None,
    *,
    deadlines: Mapping[str, float] | None = None,
    recipe: str | None = None,
) -> int:
    """Run `argv` in several processes and wait for all of them.

    Each gets RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE and OMP_NUM_THREADS, and meets the others in a folder that
    no other user can enter, BD3_SCALE_RENDEZVOUS; they listen on the loopback interface alone. Rank 0 writes to this
    process's stdout and stderr, rank k > 0 appends both to `log_dir/rank<k>.log`, by default in a folder that is
    removed at the end, where the end of the log of a rank that failed has been shown. `stop_signals` are passed on to
    every rank, once each. When a rank fails, the others get SIGTERM and, after `GRACE_SECONDS`, SIGKILL. No rank
    outlives this process, however it ends (Linux: PR_SET_PDEATHSIG). Must be called from the main thread.

    Args:
        processes: ranks to start.
        threads: CPU threads of each rank.
        deadlines: seconds without progress, by phase, after which ranks are taken for hung: they print the stacks of
            their threads, whoever is behind is named, and all are killed. None: they are not watched.
        recipe: what all ranks read, in a file of that folder whose path becomes the last word of `argv`.

    Returns:
        0, or the exit code of the rank that failed first (128 + n where signal n killed it), or `HANG`.

    Raises:
        OSError: `argv` cannot be started or a log cannot be written; no rank is left running.
    """
    with _temporary_folder() as folder:
        log_dir = log_dir or folder / "logs"
        log_dir.mkdir(parents=True, exist_ok=True)
        if recipe is not None:
            (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
            argv = [*argv, str(folder / "recipe.yaml")]
        meeting = {RENDEZVOUS_VARIABLE: str(folder), **dict.fromkeys(_INTERFACES, "lo")}
        if deadlines is None:
            return _run(argv, processes, threads, log_dir, meeting, lambda: None)
        # On this machine: storage that hangs must not keep anybody from saying so.
        heartbeats = folder / "heartbeats"
        overdue = functools.partial(Watch(heartbeats, processes).overdue, deadlines)
        return _run(argv, processes, threads, log_dir, meeting | {FOLDER_VARIABLE: str(heartbeats)}, overdue)


def _temporary_folder() -> contextlib.AbstractContextManager[Path]:
    """A folder that goes with this process; what killed ones left behind is removed."""
    return temporary_folder("launch")


def _run(
    argv: Sequence[str],
    processes: int,
    threads: int,
    log_dir: Path,
    more: Mapping[str, str],
    overdue: Callable[[], str | None],
) -> int:
    events: Events = SimpleQueue()
    previous = {s: signal.signal(s, lambda number, _: events.put(signal.Signals(number))) for s in stop_signals()}
    ranks: list[Rank] = []
    logs = [_Log.now(_log_path(log_dir, rank)) for rank in range(processes)]
    try:
        for rank in range(processes):
            ranks.append(_start(argv, rank, processes, threads, _log_path(log_dir, rank), more))
        for process in ranks:
            threading.Thread(target=_report_end, args=(process, events), daemon=True).start()
        return _supervise(ranks, events, logs, overdue)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Log(NamedTuple):
    """A rank's log, and where this launch begins in it: what an earlier one wrote explains nothing."""

    path: Path | None
    start: int

    @classmethod
    def now(cls, path: Path | None) -> _Log:
        return cls(path, path.stat().st_size if path is not None and path.exists() else 0)


def _log_path(log_dir: Path, rank: int) -> Path | None:
    return log_dir / f"rank{rank}.log" if rank else None


def _start(
    argv: Sequence[str],
    rank: int,
    processes: int,
    threads: int,
    log: Path | None,
    more: Mapping[str, str],
) -> Rank:
    environment = {
        **os.environ,
        **more,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": str(threads),
        # What lies in the current folder is no module of theirs.
        "PYTHONSAFEPATH": "1",
    }
    with contextlib.nullcontext() if log is None else log.open("ab") as output:
        return subprocess.Popen(
            argv,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            # A group of its own: a terminal's Ctrl-C reaches a rank through this process alone.
            process_group=0,
            preexec_fn=functools.partial(_die_with, os.getpid()),
        )


def _die_with(parent: int) -> None:
    if _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _report_end(process: Rank, events: Events) -> None:
    # The process stays a zombie, so that its id cannot become another's before the main thread has reaped it.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    events.put(process)


def _supervise(ranks: list[Rank], events: Events, logs: list[_Log], overdue: Callable[[], str | None]) -> int:
    running = list(ranks)
    exit_code = 0
    deadline = math.inf
    while running:
        try:
            event = events.get(timeout=min(_WATCH_SECONDS, max(0.0, deadline - time.monotonic())))
        except Empty:
            if time.monotonic() >= deadline:
                _send(signal.SIGKILL, running)
                deadline = math.inf
            elif not exit_code and (hung := overdue()):
                exit_code = HANG
                _show_stacks(hung, running, logs)
            continue
        if isinstance(event, signal.Signals):
            _send(event, running)
            continue
        running.remove(event)
        code = event.wait()
        if code and not exit_code:
            exit_code = code if code > 0 else 128 - code
            _explain(ranks.index(event), code, logs[ranks.index(event)])
            _send(signal.SIGTERM, running)
            deadline = time.monotonic() + GRACE_SECONDS
    return exit_code


def _show_stacks(hung: str, running: list[Rank], logs: list[_Log]) -> None:
    """Of all ranks, and their end. A stopped process prints its own once it goes on, and may end what others wait in:
    they tell theirs before.
    """
    places = ", ".join(["this output", *(str(log.path) for log in logs if log.path)])
    tell(f"{hung}; the stacks of all ranks are in {places}")
    _send(signal.SIGUSR2, running)
    time.sleep(_STACK_SECONDS)
    _send(signal.SIGCONT, running)
    time.sleep(_STACK_SECONDS)
    _send(signal.SIGKILL, running)


def _send(number: signal.Signals, ranks: list[Rank]) -> None:
    for process in ranks:
        os.kill(process.pid, number)


def _explain(rank: int, code: int, log: _Log) -> None:
    how = f"failed with exit code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
    if log.path is None:
        tell(f"rank {rank} {how}; its output is above")
        return
    with log.path.open("rb") as output:
        output.seek(max(log.start, log.path.stat().st_size - 2**16))
        tail = output.read().decode(errors="replace").splitlines()[-20:]
    said = f"the end of {log.path}:" if tail else f"it wrote nothing to {log.path}"
    tell("\n  ".join([f"rank {rank} {how}; {said}", *tail]))
