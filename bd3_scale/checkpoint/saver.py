"""Saves while training goes on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from bd3_scale.checkpoint.boxes import Box
from bd3_scale.checkpoint.manifest import CheckpointManifest
from bd3_scale.checkpoint.store import save_boxes
from bd3_scale.parallel.groups import group_beside_training
from bd3_scale.recipe.schema import CheckpointRecipe

_LOG = logging.getLogger(__name__)
# Seconds before another try.
_PAUSES = (2.0, 10.0)
THREAD_NAME = "bd3_scale.save"


def is_saving() -> bool:
    """Tell whether a thread of this process is in the midst of a save."""
    return any(thread.name == THREAD_NAME for thread in threading.enumerate())


class HostCopies:
    """Copies of tensors in host memory; those of a GPU are kept, and the next ones, of the same shapes, written there.

    A GPU writes to pinned memory several times as fast as to other memory, which takes long to get.
    """

    def __init__(self) -> None:
        self._pinned: list[Tensor] = []

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return what `tensors` hold now; from here on nobody reads earlier copies."""
        if any(tensor.is_cuda for tensor in tensors):
            return self._from_gpu(tensors)
        return [tensor.to("cpu", copy=True).contiguous() for tensor in tensors]

    def _from_gpu(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Wait for the copies alone, on a stream of their own. Not run on a GPU."""
        if [(copy.shape, copy.dtype) for copy in self._pinned] != [(tensor.shape, tensor.dtype) for tensor in tensors]:
            self._pinned = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
        stream = torch.cuda.Stream()
        # The update that makes what is copied may still run.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for copy, tensor in zip(self._pinned, tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
        # Then the next update may write over the tensors, and a thread read the copies.
        stream.synchronize()
        return self._pinned


@dataclass(frozen=True)
class Saved:
    """Tell what became of a save: its `checkpoint`, or the `error` of the last of `tries`.

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

    Collective: every rank saves at the same steps. A save that fails is tried again, twice. The thread does not keep a
    process that ends: what it leaves is no checkpoint.
    """

    def __init__(self, folder: Path, tokenizer: Path, recipe: CheckpointRecipe) -> None:
        self._folder, self._tokenizer, self._recipe = folder, tokenizer, recipe
        # A rank that writes for hours keeps the others waiting, who must not take it for dead.
        self._group = group_beside_training(timedelta(days=7))
        self._thread: threading.Thread | None = None
        self._outcome: Saved | BaseException | None = None
        self._ended: list[Saved] = []
        self._began, self._told = 0.0, False
        self._copies = HostCopies()

    @property
    def in_flight(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def overdue(self) -> float | None:
        """Return the seconds that a save has taken which takes longer than the recipe thinks, once of each save."""
        seconds = time.monotonic() - self._began
        if not self.in_flight or self._told or seconds < self._recipe.slow_seconds:
            return None
        self._told = True
        return seconds

    def begin(self, manifest: CheckpointManifest, boxes: Sequence[Box]) -> None:
        """Save what `boxes` hold now. Waits for the save before it, if that is not complete."""
        began = time.monotonic()
        self._settle()
        # The save that had them is complete.
        data = self._copies.of([box.data.detach() for box in boxes])
        copies = [replace(box, data=copy) for box, copy in zip(boxes, data, strict=True)]
        blocked = time.monotonic() - began
        self._began, self._told = began, False
        work = (manifest, copies, began, blocked)
        self._thread = threading.Thread(target=self._save, args=work, name=THREAD_NAME, daemon=True)
        self._thread.start()

    def ended(self, *, wait: bool = False) -> list[Saved]:
        """Return the saves that ended since the last call; `wait`: the one in flight among them."""
        if wait or not self.in_flight:
            self._settle()
        ended, self._ended = self._ended, []
        return ended

    def _settle(self) -> None:
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        assert self._outcome is not None
        self._ended.append(self._outcome)

    def _save(self, manifest: CheckpointManifest, boxes: Sequence[Box], began: float, blocked: float) -> None:
        try:
            path, error, tries = self._try(manifest, boxes)
            self._outcome = Saved(manifest.step, path, error, tries, blocked, time.monotonic() - began)
        except BaseException as unexpected:  # noqa: BLE001 - training's thread raises it
            self._outcome = unexpected

    def _try(self, manifest: CheckpointManifest, boxes: Sequence[Box]) -> tuple[Path | None, OSError | None, int]:
        for tries, pause in enumerate((*_PAUSES, None), 1):
            try:
                path = save_boxes(
                    self._folder, manifest, boxes, tokenizer=self._tokenizer, keep=self._recipe, group=self._group
                )
            except OSError as error:
                if pause is None:
                    return None, error, tries
                if dist.get_rank() == 0:
                    _LOG.warning("%s; it is tried again in %g s", error, pause)
                time.sleep(pause)
            else:
                return path, None, tries
        raise AssertionError("the last try returns")
