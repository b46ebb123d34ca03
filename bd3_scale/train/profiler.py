"""Profile chosen steps with torch.profiler: a Chrome trace, and a snapshot of the GPU memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from bd3_scale.recipe.training import ProfileRecipe

FOLDER = "profile"
# Of allocations and frees in the snapshot; the older ones are dropped. A step of a large model has some 100,000.
_MEMORY_EVENTS = 1_000_000


class StepProfiler:
    """Profiles the steps that `train.profile` names on this rank; a context manager, which ends a profile under way.

    `RUN/profile/rank0-steps-10-13.json.gz` opens in https://ui.perfetto.dev and chrome://tracing; with `memory` on a
    GPU, `….memory.pickle` opens in https://docs.pytorch.org/memory_viz. A run that resumes after these steps does
    nothing; one that resumes among them profiles those that are left.
    """

    def __init__(self, recipe: ProfileRecipe | None, folder: Path, tell: Callable[[str], None]) -> None:
        self._recipe = recipe if recipe is not None and dist.get_rank() in recipe.ranks else None
        self._folder, self._tell = folder / FOLDER, tell
        self._profile: Any = None
        self._first = self._last = 0

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is not None:
            self._end()

    def before(self, step: int) -> None:
        """Begin the profile if `step` is in it; call it before each step."""
        if self._recipe is None or self._profile is not None:
            return
        first, last = self._recipe.steps
        if not first <= step <= last:
            return
        self._first = step
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            if self._recipe.memory:
                torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
        self._profile = torch.profiler.profile(activities=activities, profile_memory=self._recipe.memory)
        self._profile.start()

    def after(self, step: int) -> None:
        """Write the profile after its last step; call it after each step."""
        if self._profile is None or self._recipe is None:
            return
        self._last = step
        if step == self._recipe.steps[1]:
            self._end()

    def _end(self) -> None:
        """End the profile and write it. A profile that cannot be written is reported; the training goes on."""
        assert self._recipe is not None
        profile, self._profile = self._profile, None
        profile.stop()
        steps = f"profile of steps {self._first} to {self._last}"
        try:
            self._tell(f"{steps}: {' and '.join(self._write(profile, self._recipe.memory))}")
        except (OSError, RuntimeError) as error:
            self._tell(f"{steps}: NOT WRITTEN to {self._folder}: {error}")

    def _write(self, profile: Any, memory: bool) -> list[str]:
        """Write the trace, and with `memory` on a GPU the snapshot; return their paths."""
        self._folder.mkdir(exist_ok=True)
        name = f"rank{dist.get_rank()}-steps-{self._first}-{self._last}"
        trace = self._folder / f"{name}.json.gz"
        # The ending decides that the trace is packed. A reader sees the whole file or none.
        part = self._folder / f".{name}.json.gz"
        profile.export_chrome_trace(str(part))
        part.replace(trace)
        if not (memory and torch.cuda.is_available()):
            return [str(trace)]
        part, snapshot = self._folder / f".{name}.pickle", self._folder / f"{name}.memory.pickle"
        torch.cuda.memory._dump_snapshot(str(part))
        torch.cuda.memory._record_memory_history(enabled=None)
        part.replace(snapshot)
        return [str(trace), str(snapshot)]
