"""Fetching the shards of batches to come while the ones before them are made."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from bd3_scale.data.shards import Shards

# Of one loader worker; known ids are half a megabyte.
AHEAD_SEQUENCES = 1 << 16
# Epoch and sample ids, int64 [B], of a batch.
Place = tuple[int, NDArray[np.int64]]


def fetched_ahead(shards: Shards, places: Iterator[Place], batch_size: int) -> Iterator[Place]:
    """Yield `places`, of `batch_size` samples each, while a thread fetches the shards of those to come, in their order.

    It looks `AHEAD_SEQUENCES` ahead, or an epoch where that has fewer, and fetches nothing that would not be fetched
    anyway: to make room it removes only shards that nobody on the node has used while so many were made, and waits
    where there are none. What it raises is raised with the batch that needs the shard; see `patiently`.
    """
    if not shards.has_remote:
        yield from places
        return
    horizon = max(1, min(AHEAD_SEQUENCES, len(shards)) // batch_size)
    fetcher = _Fetcher(shards, horizon)
    known: deque[tuple[Place, NDArray[np.int64]]] = deque()
    try:
        for place in places:
            known.append((place, shards.of(place[1])))
            fetcher.wanted.put(known[-1][1])
            if len(known) > horizon:
                place, needed = known.popleft()
                fetcher.made(needed)
                yield place
    finally:
        fetcher.end()


class _Fetcher:
    """A thread that fetches the shards of each array in `wanted`, in turns."""

    def __init__(self, shards: Shards, horizon: int) -> None:
        self.wanted: SimpleQueue[NDArray[np.int64]] = SimpleQueue()
        self._shards = shards
        self._failed: tuple[int, OSError | ValueError] | None = None
        self._times: deque[int] = deque(maxlen=horizon)
        self._goes_on = threading.Condition()
        self._ended = False
        threading.Thread(target=self._run, daemon=True).start()

    def made(self, needed: NDArray[np.int64]) -> None:
        """Tell that a batch is made now. Raises what came of a shard that it needs."""
        if self._failed is not None and self._failed[0] in needed:
            raise self._failed[1]
        with self._goes_on:
            self._times.append(time.time_ns())
            self._goes_on.notify()

    def end(self) -> None:
        """Fetch nothing more; what is under way is not waited for."""
        with self._goes_on:
            self._ended = True
            self._goes_on.notify()
        self.wanted.put(np.empty(0, np.int64))

    def _run(self) -> None:
        while not self._ended:
            for shard_id in self.wanted.get().tolist():
                try:
                    if self._waits_for_room(shard_id):
                        self._shards.prepare_shard(shard_id, blocking=False)
                except (OSError, ValueError) as error:
                    self._failed = shard_id, error
                    return

    def _waits_for_room(self, shard_id: int) -> bool:
        """Whether a shard is to be fetched, once there is room."""
        while not self._ended and self._shards.is_away(shard_id):
            with self._goes_on:
                unused_since = self._times[0] if len(self._times) == self._times.maxlen else 0
                if self._shards.make_room(unused_since):
                    return True
                self._goes_on.wait()
        return False
