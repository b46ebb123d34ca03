"""Simulate a world of ranks in the process of one: nothing is sent, and other ranks are taken to send what it sends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.zero import partitioned_param_coordinator
from torch._C._distributed_c10d import FakeWork
from torch.testing._internal.distributed.fake_pg import FakeStore

from bd3_scale.parallel.groups import ProcessGroups, split_ranks
from bd3_scale.recipe.schema import ParallelRecipe


def simulated_groups(parallel: ParallelRecipe, *, rank: int, world_size: int) -> ProcessGroups:
    """Return the groups of one rank of a simulated world: collectives return at once and move no data.

    ValueError: the layout does not divide the world.
    """
    _trust_other_ranks()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    return split_ranks(parallel)


def watch_messages(waited: Callable[[dist.Work], None]) -> None:
    """Call `waited` whenever this process waits for a collective or message; the wait itself returns at once."""

    def wait(work: dist.Work, *__: Any, **___: Any) -> bool:
        waited(work)
        return True

    FakeWork.wait = wait  # type: ignore[assignment,method-assign]


def _trust_other_ranks() -> None:
    """Disable ZeRO-3's comparison of its order of modules with rank 0, which a simulated world cannot answer."""
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda _: None
