"""Fetching the shards of batches to come while the ones before them are made."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from bd3_scale.data.order import Sequences
from bd3_scale.data.shards import Shards

# Of one loader worker; known ids are half a megabyte.
AHEAD_SEQUENCES = 1 << 16


def fetched_ahead(sources: Sequence[Shards], batches: Iterator[Sequences], batch_size: int) -> Iterator[Sequences]:
    """Yield `batches`, of `batch_size` samples each, while a thread for each remote source fetches the shards of those
    to come, in their order.

    It looks `AHEAD_SEQUENCES` ahead, or an epoch where that has fewer, and fetches nothing that would not be fetched
    anyway: to make room it removes only shards that nobody on the node has used while so many were made, and waits
    where there are none. What it raises is raised with the batch that needs the shard; see `patiently`.
    """
    remote = {number: shards for number, shards in enumerate(sources) if shards.has_remote}
    if not remote:
        yield from batches
        return
    horizon = max(1, min(AHEAD_SEQUENCES, *(len(shards) for shards in remote.values())) // batch_size)
    fetchers = {number: _Fetcher(shards, horizon) for number, shards in remote.items()}
    known: deque[tuple[Sequences, dict[int, NDArray[np.int64]]]] = deque()
    try:
        for batch in batches:
            needed = {number: shards.of(batch.ids[batch.sources == number]) for number, shards in remote.items()}
            known.append((batch, needed))
            for number, fetcher in fetchers.items():
                fetcher.wanted.put(needed[number])
            if len(known) > horizon:
                batch, needed = known.popleft()
                for number, fetcher in fetchers.items():
                    fetcher.made(needed[number])
                yield batch
    finally:
        for fetcher in fetchers.values():
            fetcher.end()


class _Fetcher:
    """A thread that fetches the shards of each array in `wanted`, in turns."""

    def __init__(self, shards: Shards, horizon: int) -> None:
        self.wanted: SimpleQueue[NDArray[np.int64]] = SimpleQueue()
        self._files = shards.files
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
                        self._files.prepare(shard_id, waits=False)
                except (OSError, ValueError) as error:
                    self._failed = shard_id, error
                    return

    def _waits_for_room(self, shard_id: int) -> bool:
        """Return whether a shard is to be fetched, once there is room."""
        while not self._ended and self._files.is_away(shard_id):
            with self._goes_on:
                unused_since = self._times[0] if len(self._times) == self._times.maxlen else 0
                if self._files.make_room(unused_since):
                    return True
                self._goes_on.wait()
        return False
