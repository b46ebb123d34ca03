"""Saves while training goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from bd3_scale.checkpoint.boxes import Box
from bd3_scale.checkpoint.manifest import CheckpointManifest
from bd3_scale.checkpoint.store import save_boxes
from bd3_scale.recipe.schema import CheckpointRecipe

_LOG = logging.getLogger(__name__)
# Seconds before another try.
_PAUSES = (2.0, 10.0)


@dataclass(frozen=True)
class Saved:
    """What became of a save: its `checkpoint`, or the `error` of the last of `tries`.

    blocked, seconds: that training waited for it to begin, and until it was complete.
    """

    step: int
    checkpoint: Path | None
    error: OSError | None
    tries: int
    blocked: float
    seconds: float


class CheckpointSaver:
    """Copies a rank's boxes and writes them in a thread, over a process group of its own; one save at a time.

    A context manager, which waits for the last save, and collective: every rank saves at the same steps. A save that
    fails is tried again, twice.
    """

    def __init__(self, folder: Path, tokenizer: Path, recipe: CheckpointRecipe) -> None:
        self._folder, self._tokenizer, self._recipe = folder, tokenizer, recipe
        # Training's collectives go on meanwhile: messages of one group cannot be mistaken for those of another.
        self._group = dist.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[Saved] | None = None
        self._ended: list[Saved] = []
        self._began, self._told = 0.0, False

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error that not all ranks share, others may never come to the collectives of a save.
        self._thread.shutdown(wait=error is None or isinstance(error, FloatingPointError))

    @property
    def in_flight(self) -> bool:
        return self._running is not None and not self._running.done()

    def overdue(self) -> float | None:
        """Seconds since the beginning of a save that takes longer than the recipe thinks; told once of each save."""
        seconds = time.monotonic() - self._began
        if not self.in_flight or self._told or seconds < self._recipe.slow_seconds:
            return None
        self._told = True
        return seconds

    def begin(self, manifest: CheckpointManifest, boxes: Sequence[Box]) -> None:
        """Save what `boxes` hold now. Waits for the save before it, if that is not complete."""
        began = time.monotonic()
        self._settle()
        copies = [replace(box, data=box.data.detach().to("cpu", copy=True).contiguous()) for box in boxes]
        blocked = time.monotonic() - began
        self._began, self._told = began, False
        self._running = self._thread.submit(self._save, manifest, copies, began, blocked)

    def ended(self, *, wait: bool = False) -> list[Saved]:
        """Saves that ended since the last call; `wait`: the one in flight among them."""
        if wait or not self.in_flight:
            self._settle()
        ended, self._ended = self._ended, []
        return ended

    def _settle(self) -> None:
        if self._running is not None:
            self._ended.append(self._running.result())
            self._running = None

    def _save(self, manifest: CheckpointManifest, boxes: Sequence[Box], began: float, blocked: float) -> Saved:
        for tries, pause in enumerate((*_PAUSES, None), 1):
            try:
                path = save_boxes(
                    self._folder, manifest, boxes, tokenizer=self._tokenizer, keep=self._recipe, group=self._group
                )
            except OSError as error:
                if pause is None:
                    return Saved(manifest.step, None, error, tries, blocked, time.monotonic() - began)
                if dist.get_rank() == 0:
                    _LOG.warning("%s; it is tried again in %g s", error, pause)
                time.sleep(pause)
            else:
                return Saved(manifest.step, path, None, tries, blocked, time.monotonic() - began)
        raise AssertionError("the last try returns")
