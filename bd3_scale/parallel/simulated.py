"""A world of ranks of which one exists: what it would send goes nowhere, and what it is told is what it said."""

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
    """Return the groups of a rank whose world does not exist: collectives return at once, and move nothing.

    ValueError: the layout does not divide the world.
    """
    _trust_other_ranks()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    return split_ranks(parallel)


def watch_messages(waited: Callable[[dist.Work], None]) -> None:
    """Call `waited` whenever this process waits for a collective or message, which is done at once."""

    def wait(work: dist.Work, *__: Any, **___: Any) -> bool:
        waited(work)
        return True

    FakeWork.wait = wait  # type: ignore[assignment,method-assign]


def _trust_other_ranks() -> None:
    """Leave out that ZeRO-3 compares its order of modules with rank 0, which says nothing."""
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda _: None
