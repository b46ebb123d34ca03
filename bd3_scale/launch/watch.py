"""Whether ranks still get on, by what their heartbeats tell; with the standard library alone."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bd3_scale.launch.records import read_json

_SILENT_SECONDS = 5.0
_PAUSE_SECONDS = 60.0


def _deadline(deadlines: Mapping[str, float], phase: str) -> float:
    # A process that has come to its end may still write. A job of an earlier version has no deadline for data.
    counted = "checkpoint" if phase in ("stopped", "done", "failed") else phase
    return deadlines[counted] if counted != "data" else deadlines.get(counted, max(deadlines.values()))


class Watch:
    """Reads the heartbeats of `ranks` ranks in `folder` (see `resilience.heartbeat`)."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self._folder, self._ranks = folder, ranks
        self._began = time.monotonic()
        self._seen: dict[int, tuple[tuple[Any, ...], float]] = {}
        self._beats: dict[int, tuple[int, float]] = {}
        self._looked = self._began

    def read(self) -> dict[int, dict[str, Any]]:
        """Return the newest heartbeat of every rank that has told something."""
        found = {}
        for path in self._folder.glob("rank*.json"):
            if state := read_json(path):
                found[int(path.stem.removeprefix("rank"))] = state
        return found

    def overdue(self, deadlines: Mapping[str, float]) -> str | None:
        """Why the ranks must be taken for hung, or None. By this process's clock: those of nodes may differ.

        deadlines: seconds without progress in each phase. They begin anew where nobody has asked for a minute: then
            this process was stopped, perhaps with its whole machine.
        """
        now = time.monotonic()
        if now - self._looked > _PAUSE_SECONDS:
            self._began = now
            self._seen, self._beats = {}, {}
        found = self._overdue(deadlines, now)
        self._looked = time.monotonic()
        return found

    def _overdue(self, deadlines: Mapping[str, float], now: float) -> str | None:
        states = self.read()
        late: list[str] = []
        # Whoever waits for its batch keeps the others waiting for it, in a collective of whatever phase.
        waits = any(state["phase"] == "data" for state in states.values())
        for rank in range(self._ranks):
            state = states.get(rank, {"phase": "start", "step": 0, "beat": 0})
            here = (state["phase"], state["step"])
            if rank not in self._seen or self._seen[rank][0] != here or (waits and state["phase"] != "data"):
                self._seen[rank] = here, now if rank in self._seen else self._began
            if rank not in self._beats or self._beats[rank][0] != state["beat"]:
                self._beats[rank] = state["beat"], now
            if now - self._seen[rank][1] > _deadline(deadlines, state["phase"]):
                late.append(state["phase"])
        if not late:
            return None
        return f"hang in phase {late[0]!r} after {_deadline(deadlines, late[0]):g} s: {self._culprits(states, now)}"

    def _culprits(self, states: Mapping[int, Mapping[str, Any]], now: float) -> str:
        """Return the ranks that are behind, those that do not run at all, and where each one was."""
        if missing := [rank for rank in range(self._ranks) if rank not in states]:
            return f"ranks {missing} never told that they live"
        low = min(state["step"] for state in states.values())
        lowest = [rank for rank, state in sorted(states.items()) if state["step"] == low]
        text = f"lowest step {low} at ranks {lowest}"
        if silent := [rank for rank, (_, at) in sorted(self._beats.items()) if now - at > _SILENT_SECONDS]:
            text += f"; ranks {silent} do not run (stopped, or their node is gone)"
        places: dict[str, list[int]] = defaultdict(list)
        for rank, state in sorted(states.items()):
            if state.get("at"):
                places[state["at"]].append(rank)
        return text + "".join(f"; ranks {ranks} in {place}" for place, ranks in places.items())
