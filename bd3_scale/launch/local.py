"""Start the ranks of a run on this machine, and end them together."""

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

from bd3_scale.launch.hangs import HangDetector
from bd3_scale.resilience.heartbeat import FOLDER_VARIABLE
from bd3_scale.resilience.leftovers import temporary_folder
from bd3_scale.resilience.secret import RENDEZVOUS_VARIABLE
from bd3_scale.resilience.signals import stop_signals
from bd3_scale.resilience.terminal import tell

# The time between SIGTERM and SIGKILL for the ranks of a failed run. They can save nothing consistent any more.
GRACE_SECONDS = 10.0
# The exit code of a run whose ranks hung: it can continue from its last checkpoint (sysexits.h, EX_TEMPFAIL).
EXIT_HANG = 75

_WATCH_SECONDS = 1.0
_STACK_SECONDS = 1.5  # what printing the stacks may take
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

    Each rank gets RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE and OMP_NUM_THREADS. The ranks find each other through
    a folder that no other user can enter, BD3_SCALE_RENDEZVOUS, and listen on the loopback interface alone. Rank 0
    writes to this process's stdout and stderr; rank k > 0 appends both to `log_dir/rank<k>.log`. The default `log_dir`
    is removed at the end, after the last lines of a failed rank were shown. `stop_signals` are passed on to every rank
    exactly once. When a rank fails, the others get SIGTERM and, after `GRACE_SECONDS`, SIGKILL. No rank outlives this
    process, however it ends (Linux: PR_SET_PDEATHSIG). Must be called from the main thread.

    Args:
        processes: the number of ranks.
        threads: CPU threads of each rank.
        deadlines: seconds without progress, by phase, after which the ranks count as hung: they print the stacks of
            their threads, the slowest ranks are named, and all are killed. None: no check.
        recipe: the text of the recipe for all ranks; it is written to a file, whose path is appended to `argv`.

    Returns:
        0, or the exit code of the rank that failed first (128 + n if signal n killed it), or `EXIT_HANG`.
    Raises:
        OSError: `argv` cannot be started or a log cannot be written; no rank is left running.
    """
    with _temporary_folder() as folder:
        log_dir = log_dir or folder / "logs"
        log_dir.mkdir(parents=True, exist_ok=True)
        if recipe is not None:
            (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
            argv = [*argv, str(folder / "recipe.yaml")]
        rendezvous = {RENDEZVOUS_VARIABLE: str(folder), **dict.fromkeys(_INTERFACES, "lo")}
        if deadlines is None:
            return _run(argv, processes, threads, log_dir, rendezvous, lambda: None)
        # On a local disk: when the run's storage hangs, the heartbeats must still arrive.
        heartbeats = folder / "heartbeats"
        find_hang = functools.partial(HangDetector(heartbeats, processes).find_hang, deadlines)
        return _run(argv, processes, threads, log_dir, rendezvous | {FOLDER_VARIABLE: str(heartbeats)}, find_hang)


def _temporary_folder() -> contextlib.AbstractContextManager[Path]:
    """Make a folder that is removed with this process; leftovers of killed launchers are removed first."""
    return temporary_folder("launch")


def _run(
    argv: Sequence[str],
    processes: int,
    threads: int,
    log_dir: Path,
    extra_environment: Mapping[str, str],
    find_hang: Callable[[], str | None],
) -> int:
    events: Events = SimpleQueue()
    previous = {s: signal.signal(s, lambda number, _: events.put(signal.Signals(number))) for s in stop_signals()}
    ranks: list[Rank] = []
    logs = [_Log.now(_log_path(log_dir, rank)) for rank in range(processes)]
    try:
        for rank in range(processes):
            ranks.append(_start(argv, rank, processes, threads, _log_path(log_dir, rank), extra_environment))
        for process in ranks:
            threading.Thread(target=_report_end, args=(process, events), daemon=True).start()
        return _supervise(ranks, events, logs, find_hang)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Log(NamedTuple):
    """A rank's log, and the position at which this launch begins in it: an earlier launch may have written before."""

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
    extra_environment: Mapping[str, str],
) -> Rank:
    environment = {
        **os.environ,
        **extra_environment,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": str(threads),
        # Ranks must not import modules from the current folder.
        "PYTHONSAFEPATH": "1",
    }
    with contextlib.nullcontext() if log is None else log.open("ab") as output:
        return subprocess.Popen(
            argv,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            # In its own process group a rank does not get a terminal's Ctrl-C directly, but from this process, once.
            process_group=0,
            preexec_fn=functools.partial(_die_with, os.getpid()),
        )


def _die_with(parent: int) -> None:
    """Ask the kernel to kill this process when its parent ends; runs in the child, between fork and exec."""
    if _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # The parent may have ended before the call above: then the kernel will send nothing.
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _report_end(process: Rank, events: Events) -> None:
    # WNOWAIT leaves the process a zombie: its id cannot be reused before the main thread reaps it, so `_send` is safe.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    events.put(process)


def _supervise(ranks: list[Rank], events: Events, logs: list[_Log], find_hang: Callable[[], str | None]) -> int:
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
            elif not exit_code and (hung := find_hang()):
                exit_code = EXIT_HANG
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
    """Make all ranks print their stacks, then kill them.

    Running ranks print first. A stopped one prints when SIGCONT lets it continue, which may end the collective that
    the others wait in; their stacks would then no longer show it.
    """
    outputs = ", ".join(["this output", *(str(log.path) for log in logs if log.path)])
    tell(f"{hung}; the stacks of all ranks are in {outputs}")
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
    summary = f"the end of {log.path}:" if tail else f"it wrote nothing to {log.path}"
    tell("\n  ".join([f"rank {rank} {how}; {summary}", *tail]))
