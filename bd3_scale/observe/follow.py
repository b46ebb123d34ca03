"""Follow the files of a run while they grow."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from bd3_scale.observe.metrics import EVENTS_FILE, METRICS_FILE, SAMPLES_FILE, parse_record
from bd3_scale.observe.report_data import RunRecords, read_recipe, why_unreadable
from bd3_scale.resilience.readers import open_regular, reader
from bd3_scale.resilience.runlock import is_in_use


class RecordFollower:
    """The records of one file of lines. `records` holds them all; `refresh` reads what was appended since."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: tuple[int, int] | None = None
        self._position = 0
        self.records: list[dict[str, Any]] = []

    def refresh(self) -> list[dict[str, Any]]:
        """Return the new records. An unfinished last line waits for the next call; damaged lines are left out.

        A run that resumes replaces its file by a shorter one: then all of it is read again, and is new.
        """
        try:
            return self._read(self.path)
        except FileNotFoundError:
            return []

    @reader("records of a run")
    def _read(self, path: Path) -> list[dict[str, Any]]:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            if self._file != (status.st_dev, status.st_ino) or status.st_size < self._position:
                self._file, self._position = (status.st_dev, status.st_ino), 0
                self.records.clear()
            file.seek(self._position)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._position += len(whole)
        new = [record for line in whole.splitlines(keepends=True) if (record := parse_record(line, path)) is not None]
        self.records += new
        return new


class RunFollower:
    """A run's records as they come. ValueError: `folder` is no run directory."""

    def __init__(self, folder: Path) -> None:
        self._run = RunRecords(folder, read_recipe(folder, []), [], [], [], [], [], in_use=False)
        self._files = [RecordFollower(folder / name) for name in (METRICS_FILE, EVENTS_FILE, SAMPLES_FILE)]

    def refresh(self) -> tuple[RunRecords, list[dict[str, Any]]]:
        """Return the run as it stands, and the metrics and events that are new since the last call."""
        # Without its metrics a run has nothing to show; without the other two files it has.
        notes = [None, *(why_unreadable(file.path) for file in self._files[1:])]
        new = [[] if note else file.refresh() for file, note in zip(self._files, notes, strict=True)]
        metrics, events, samples = (file.records for file in self._files)
        self._run = dataclasses.replace(
            self._run,
            metrics=metrics,
            events=events,
            samples=samples,
            notes=[note for note in notes if note],
            in_use=is_in_use(self._run.folder),
        )
        return self._run, new[0] + new[1]
