"""Save checkpoints in a thread while training goes on."""

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
# Seconds before the second and the third try: a file system that fails over answers again after some seconds.
_PAUSES = (2.0, 10.0)
THREAD_NAME = "bd3_scale.save"


def is_saving() -> bool:
    """Tell whether a thread of this process is saving a checkpoint."""
    return any(thread.name == THREAD_NAME for thread in threading.enumerate())


class HostCopies:
    """Copies of tensors in host memory. Copies from a GPU go to pinned memory, which is kept for the next save.

    A GPU writes to pinned memory several times as fast as to pageable memory, but to allocate it takes long.
    """

    def __init__(self) -> None:
        self._pinned: list[Tensor] = []

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return copies of `tensors`. They may overwrite earlier copies, so the save of those must be complete."""
        if any(tensor.is_cuda for tensor in tensors):
            return self._from_gpu(tensors)
        return [tensor.to("cpu", copy=True).contiguous() for tensor in tensors]

    def _from_gpu(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copy on a separate stream and wait for that stream alone. Never run on a GPU."""
        if [(copy.shape, copy.dtype) for copy in self._pinned] != [(tensor.shape, tensor.dtype) for tensor in tensors]:
            self._pinned = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
        stream = torch.cuda.Stream()
        # The optimiser's kernels that write these tensors may still run on training's stream.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for copy, tensor in zip(self._pinned, tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
        # Behind this point the next update may overwrite the tensors, and the saving thread may read the copies.
        stream.synchronize()
        return self._pinned


@dataclass(frozen=True)
class Saved:
    """The outcome of a save: its `checkpoint`, or the `error` of the last of `tries`.

    blocked: seconds that training waited for the save to begin; seconds: from that call to its end.
    """

    step: int
    checkpoint: Path | None
    error: OSError | None
    tries: int
    blocked: float
    seconds: float


class CheckpointSaver:
    """Copies a rank's boxes and writes them in a thread, one save at a time.

    Collective: every rank saves at the same steps. The thread has its own process group, since two threads must not use
    one group at once: their collectives could start in different orders on different ranks. A save that fails is tried
    again, twice. The thread is a daemon, which does not keep an ending process alive: an unfinished save leaves no
    checkpoint, only a folder with a dot.
    """

    def __init__(self, folder: Path, tokenizer: Path, recipe: CheckpointRecipe) -> None:
        self._folder, self._tokenizer, self._recipe = folder, tokenizer, recipe
        # The ranks wait in a collective for the slowest writer, which may take hours on a slow file system; the usual
        # timeout would count it as dead.
        self._group = group_beside_training(timedelta(days=7))
        self._thread: threading.Thread | None = None
        self._outcome: Saved | BaseException | None = None
        self._ended: list[Saved] = []
        self._began, self._reported = 0.0, False
        self._copies = HostCopies()

    @property
    def in_flight(self) -> bool:
        """Tell whether a save is running."""
        return self._thread is not None and self._thread.is_alive()

    def overdue(self) -> float | None:
        """Return the seconds that the running save has taken if they exceed `checkpoint.slow_seconds`; once per
        save."""
        seconds = time.monotonic() - self._began
        if not self.in_flight or self._reported or seconds < self._recipe.slow_seconds:
            return None
        self._reported = True
        return seconds

    def begin(self, manifest: CheckpointManifest, boxes: Sequence[Box]) -> None:
        """Save what `boxes` hold now; first wait for the save before, which reads the host copies."""
        began = time.monotonic()
        self._join()
        data = self._copies.of([box.data.detach() for box in boxes])
        copies = [replace(box, data=copy) for box, copy in zip(boxes, data, strict=True)]
        blocked = time.monotonic() - began
        self._began, self._reported = began, False
        work = (manifest, copies, began, blocked)
        self._thread = threading.Thread(target=self._save, args=work, name=THREAD_NAME, daemon=True)
        self._thread.start()

    def ended(self, *, wait: bool = False) -> list[Saved]:
        """Return the saves that ended since the last call; with `wait`, wait for the running one and include it."""
        if wait or not self.in_flight:
            self._join()
        ended, self._ended = self._ended, []
        return ended

    def _join(self) -> None:
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
                    _LOG.warning("%s; another try follows in %g s", error, pause)
                time.sleep(pause)
            else:
                return path, None, tries
        raise AssertionError("the last try returns")
