"""Agreement between ranks on things that one of them does or sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from bd3_scale.parallel.groups import local_device

T = TypeVar("T")


def on_rank_zero(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run `action` on rank 0 and give its result, which must be picklable, to all ranks (collective).

    group: of all ranks; by default the one that training uses.

    Raises:
        ValueError, OSError: on every rank, where `action` raised one on rank 0; nobody is left waiting.
    """
    outcome: list[T | ValueError | OSError | None] = [None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except (ValueError, OSError) as error:
            outcome[0] = error
    dist.broadcast_object_list(outcome, src=0, group=group)
    if isinstance(outcome[0], ValueError | OSError):
        raise outcome[0]
    return outcome[0]  # type: ignore[return-value]


def any_rank(flag: bool) -> bool:
    """Whether `flag` is set on any rank (collective)."""
    value = torch.tensor(int(flag), device=local_device())
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value)


def gather_objects(item: T, group: dist.ProcessGroup | None = None) -> Sequence[T]:
    """`item` of every rank of `group`, by default of the world, in the order of ranks (collective)."""
    items: list[T] = [item] * dist.get_world_size(group)
    dist.all_gather_object(items, item, group=group)
    return items
