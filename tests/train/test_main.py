"""Check how a rank's process ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

pytestmark = pytest.mark.launch

# Rank 1 fails while a thread of its, as a save's does, waits for rank 0: an orderly end is then an
# abort, or none at all.
RANK = """
import sys, threading, time
import torch.distributed as dist
from bd3_scale.checkpoint import saver
from bd3_scale.train import main as program

def fails(recipe, heartbeat):
    dist.init_process_group("gloo")
    group = dist.new_group(backend="gloo")
    if dist.get_rank() == 0:
        sys.stdin.read()
        return
    waits = lambda: dist.all_gather_object([None, None], "saved", group=group)
    threading.Thread(target=waits, daemon=True, name=saver.THREAD_NAME).start()
    time.sleep(1)
    try:
        raise ValueError("the shard is damaged")
    finally:
        dist.destroy_process_group()

program.train = fails
program.main(None)
"""


def end_of_rank_1() -> tuple[int, str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env=os.environ | common | {"RANK": str(rank)},
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = ranks[1].communicate(timeout=120)[1]
        return ranks[1].returncode, said
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def test_an_error_beside_a_save_ends_with_its_own_exit_code() -> None:
    found, said = end_of_rank_1()
    assert (found, said.splitlines()[-1]) == (2, "error: the shard is damaged"), said
