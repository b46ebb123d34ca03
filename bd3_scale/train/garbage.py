"""Collect Python's garbage at fixed steps, on all ranks alike."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Python collects when enough objects were made, at other times on each rank, and the ranks wait for the slowest one. A
# step leaves few cycles, but some may hold tensors of the device: so many steps bound what they keep.
COLLECT_EVERY = 100


@contextmanager
def scheduled_garbage_collection() -> Iterator[Callable[[int], None]]:
    """Turn automatic collection off inside the block; yield what is to be called after each step, with its number.

    What exists at the beginning (modules, model, optimiser) is never looked at again: a collection that goes through
    all of it takes a large part of a second. At the end everything is as before.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()

    def after(step: int) -> None:
        if step % COLLECT_EVERY == 0:
            gc.collect()

    try:
        yield after
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
