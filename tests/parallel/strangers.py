"""Run one of two ranks, where the other is a process of another user."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed import TCPStore, distributed_c10d

from bd3_scale.parallel.groups import process_groups
from bd3_scale.parallel.rendezvous import SealedStore, show_secret
from bd3_scale.recipe.load import load_recipe
from bd3_scale.recipe.schema import ParallelRecipe
from bd3_scale.resilience.secret import SECRET_VARIABLE
from bd3_scale.train.main import main

NOBODY = 65534


class Evil:
    """An object that writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "here"))


def is_joined_by_a_stranger(written: Path) -> None:
    """Check rank 1 as another user, who can reach the ports, and who sends a pickle."""
    if os.environ["RANK"] == "0":
        with (
            pytest.raises(ConnectionError, match=r"ranks \[1\] did not come within 5 s"),
            process_groups(ParallelRecipe(), agree="mine", timeout=timedelta(seconds=5)),
        ):
            pass
        assert not written.exists()
        return
    secret = Path(os.environ.pop(SECRET_VARIABLE))
    if os.geteuid() == 0:
        os.setuid(NOBODY)
        with pytest.raises(PermissionError):
            secret.read_bytes()
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # The first release let a rank join like this, and say what the recipe is.
    store = TCPStore(*address, 2, is_master=False, timeout=timedelta(seconds=10))
    with contextlib.suppress(RuntimeError, PermissionError):
        dist.init_process_group("gloo", store=store, rank=1, world_size=2, timeout=timedelta(seconds=5))
        dist.all_gather_object([None, None], Evil(written))


def reads_what_a_stranger_wrote() -> None:
    """Check an attacker who lists the keys of the store and overwrites each, also with values of other keys."""
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    master = os.environ["RANK"] == "0"
    store = TCPStore(*address, 2, is_master=master, timeout=timedelta(seconds=20))
    plain = TCPStore(*address, 2, is_master=False, timeout=timedelta(seconds=20)) if master else store
    if not master:
        store.wait(["two are there"], timedelta(seconds=20))
        keys = [key for key in store.list_keys() if len(key) == 64]
        assert len(keys) == 2
        first, second = (store.get(key) for key in keys)
        assert not any(b"ddress" in part for part in (first, second, *(key.encode() for key in keys)))
        store.set(keys[0], second)
        store.set(keys[1], b"10.0.0.1:666")
        store.set("forged", "")
        store.wait(["read"], timedelta(seconds=20))
        return
    sealed = SealedStore(store, b"s" * 32)
    sealed.set("address 0", b"10.0.0.7:1")
    sealed.set("address 1", "10.0.0.8:1")
    assert [sealed.get("address 0"), sealed.get("address 1")] == [b"10.0.0.7:1", b"10.0.0.8:1"]
    assert sealed.multi_get(["address 1"]) == [b"10.0.0.8:1"]
    assert not sealed.check(["address 2"])
    plain.set("two are there", "")
    plain.wait(["forged"], timedelta(seconds=20))
    for key in ("address 0", "address 1"):
        with pytest.raises(ConnectionError, match="not written by a rank of this run"):
            sealed.get(key)
    plain.set("read", "")
    time.sleep(0.2)  # the server ends with this process


def knows_another_secret() -> None:
    """Check two ranks that reach each other's ports, one of which knows another secret."""
    rank = int(os.environ["RANK"])
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(*address, 2, is_master=rank == 0, timeout=timedelta(seconds=20))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=20))
    show_secret(b"the same on both".ljust(32))
    with pytest.raises(ConnectionError, match=rf"ranks \[{1 - rank}\] do not know the secret"):
        show_secret(str(rank).encode() * 32)
    dist.destroy_process_group()


def trains(recipe: Path) -> None:
    """Check a run with an evaluation and two saves: no pickle is read except where torch's checkpoints are planned."""
    read, where = distributed_c10d._tensor_to_object, set()

    def noted(*args):
        frame = sys._getframe()
        while frame is not None and "torch/distributed/checkpoint/" not in frame.f_code.co_filename:
            frame = frame.f_back
        where.add("plans" if frame is not None else "elsewhere")
        return read(*args)

    distributed_c10d._tensor_to_object = noted
    main(load_recipe(recipe, []))
    assert where == {"plans"}
