"""Starts real ranks for the integration tests, from a server that has imported everything once."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["launching", "preloaded"])


def _start_server() -> None:
    """Python 3.11's server does not take over `sys.path`, and leaves out what it then cannot import."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *([before] if before else [])])
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_ranks(target: Callable[..., None], world_size: int, *args: object, logs: Path, timeout: float = 90) -> None:
    """Run `target(*args)` on `world_size` ranks and fail with the output of those that failed, the first one first."""
    _start_server()
    logs.mkdir(parents=True, exist_ok=True)
    environment = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
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
            if time.monotonic() > deadline + 5:  # the ranks show where they are, and end
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
    import torch

    torch.set_num_threads(1)
    target(*args)
