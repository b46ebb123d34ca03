"""Prefetch the shards of later batches from remote storage while earlier batches are made."""

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

# How far one loader worker looks ahead; the sample ids of so many sequences take half a megabyte.
PREFETCH_SEQUENCES = 1 << 16


def prefetch_shards(sources: Sequence[Shards], batches: Iterator[Sequences], batch_size: int) -> Iterator[Sequences]:
    """Yield `batches`, of `batch_size` samples each; a thread for each remote source fetches the shards of later ones.

    It looks `PREFETCH_SEQUENCES` ahead, or one epoch if that is shorter. It must not cause extra downloads: to make
    room it removes only shards that no process of the node has used for as many batches as it looks ahead, and waits
    if there are none. An error of the thread is raised with the batch that needs the shard; see `with_retries`.
    """
    remote = {number: shards for number, shards in enumerate(sources) if shards.has_remote}
    if not remote:
        yield from batches
        return
    horizon = max(1, min(PREFETCH_SEQUENCES, *(len(shards) for shards in remote.values())) // batch_size)
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
                    fetcher.start_batch(needed[number])
                yield batch
    finally:
        for fetcher in fetchers.values():
            fetcher.end()


class _Fetcher:
    """A thread that fetches the shards of each array in `wanted`, one after the other."""

    def __init__(self, shards: Shards, horizon: int) -> None:
        self.wanted: SimpleQueue[NDArray[np.int64]] = SimpleQueue()
        self._files = shards.files
        self._failed: tuple[int, OSError | ValueError] | None = None
        # The start times of the last `horizon` batches: once full, the first entry is one look-ahead ago.
        self._times: deque[int] = deque(maxlen=horizon)
        self._wake_up = threading.Condition()
        self._ended = False
        threading.Thread(target=self._run, daemon=True).start()

    def start_batch(self, needed: NDArray[np.int64]) -> None:
        """Note that a batch is made now. Raises the thread's error if the batch needs the shard that failed."""
        if self._failed is not None and self._failed[0] in needed:
            raise self._failed[1]
        with self._wake_up:
            self._times.append(time.time_ns())
            self._wake_up.notify()

    def end(self) -> None:
        """Stop fetching; a running download is not waited for."""
        with self._wake_up:
            self._ended = True
            self._wake_up.notify()
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
        """Wait until there is room for a shard; return False if it need not be fetched any more."""
        while not self._ended and self._files.is_absent(shard_id):
            with self._wake_up:
                # Only shards unused for a whole look-ahead may go: the batches in it may need the others again.
                unused_since = self._times[0] if len(self._times) == self._times.maxlen else 0
                if self._files.make_room(unused_since):
                    return True
                self._wake_up.wait()
        return False
