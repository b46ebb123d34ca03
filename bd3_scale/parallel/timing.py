"""Measure the parts of a step without waiting for the device."""

from __future__ import annotations

import time
from typing import Any

import torch


class StepTimer:
    """Seconds between points of a step, on a GPU by events in its stream, which cost no synchronisation.

    On a GPU, read it once the host has waited for the device after the last point.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._parts: dict[str, tuple[Any, Any]] = {}

    def point(self) -> Any:
        """Return the present point of the device's work."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def part(self, name: str, start: Any, end: Any) -> None:
        """Give the time between two points a name."""
        self._parts[name] = (start, end)

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part."""
        if self._on_gpu:
            return {name: start.elapsed_time(end) / 1000 for name, (start, end) in self._parts.items()}
        return {name: end - start for name, (start, end) in self._parts.items()}
