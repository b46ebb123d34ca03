"""Detect ranks that hang, from their heartbeats; needs the standard library alone."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bd3_scale.launch.records import read_json

_SILENT_SECONDS = 5.0  # without a beat for longer, a rank does not run; it writes one every second
_PAUSE_SECONDS = 60.0


def _deadline(deadlines: Mapping[str, float], phase: str) -> float:
    # A rank that ends may still write a checkpoint. job.json of an earlier version has no deadline for data.
    key = "checkpoint" if phase in ("stopped", "done", "failed") else phase
    return deadlines[key] if key != "data" else deadlines.get(key, max(deadlines.values()))


class HangDetector:
    """Reads the heartbeats of `ranks` ranks in `folder` (see `resilience.heartbeat`) and finds ranks without progress.

    All times are of this process's monotonic clock, since the clocks of nodes may differ.
    """

    def __init__(self, folder: Path, ranks: int) -> None:
        self._folder, self._ranks = folder, ranks
        self._began = time.monotonic()
        # By rank: the last phase and step, and when they were first seen; the last beat, and when.
        self._progress: dict[int, tuple[tuple[Any, ...], float]] = {}
        self._beats: dict[int, tuple[int, float]] = {}
        self._last_check = self._began

    def read(self) -> dict[int, dict[str, Any]]:
        """Return the newest heartbeat of every rank that has written one."""
        states = {}
        for path in self._folder.glob("rank*.json"):
            if state := read_json(path):
                states[int(path.stem.removeprefix("rank"))] = state
        return states

    def find_hang(self, deadlines: Mapping[str, float]) -> str | None:
        """Return why the ranks count as hung, or None.

        deadlines: seconds without progress in each phase. They start again if nobody called this for a minute: then
            this process was stopped, perhaps with its whole machine, and the ranks with it.
        """
        now = time.monotonic()
        if now - self._last_check > _PAUSE_SECONDS:
            self._began = now
            self._progress, self._beats = {}, {}
        reason = self._find_hang(deadlines, now)
        self._last_check = time.monotonic()
        return reason

    def _find_hang(self, deadlines: Mapping[str, float], now: float) -> str | None:
        states = self.read()
        late: list[str] = []
        # Other ranks wait in a collective for a rank that waits for its batch: their deadlines must not run meanwhile.
        waits = any(state["phase"] == "data" for state in states.values())
        for rank in range(self._ranks):
            state = states.get(rank, {"phase": "start", "step": 0, "beat": 0})
            progress = (state["phase"], state["step"])
            is_known = rank in self._progress
            if not is_known or self._progress[rank][0] != progress or (waits and state["phase"] != "data"):
                self._progress[rank] = progress, now if is_known else self._began
            if rank not in self._beats or self._beats[rank][0] != state["beat"]:
                self._beats[rank] = state["beat"], now
            if now - self._progress[rank][1] > _deadline(deadlines, state["phase"]):
                late.append(state["phase"])
        if not late:
            return None
        return f"hang in phase {late[0]!r} after {_deadline(deadlines, late[0]):g} s: {self._culprits(states, now)}"

    def _culprits(self, states: Mapping[int, Mapping[str, Any]], now: float) -> str:
        """Return the ranks with the lowest step, those that do not run at all, and where each rank is."""
        if missing := [rank for rank in range(self._ranks) if rank not in states]:
            return f"ranks {missing} never wrote a heartbeat"
        low = min(state["step"] for state in states.values())
        lowest = [rank for rank, state in sorted(states.items()) if state["step"] == low]
        text = f"lowest step {low} at ranks {lowest}"
        if silent := [rank for rank, (_, at) in sorted(self._beats.items()) if now - at > _SILENT_SECONDS]:
            text += f"; ranks {silent} do not run (stopped, or their node is gone)"
        locations: dict[str, list[int]] = defaultdict(list)
        for rank, state in sorted(states.items()):
            if state.get("at"):
                locations[state["at"]].append(rank)
        return text + "".join(f"; ranks {ranks} in {location}" for location, ranks in locations.items())
