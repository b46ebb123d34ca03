"""The tasks that preparing is cut into: they depend on the source files alone, not on who does them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bd3_scale.data.files import PACKINGS, format_of
from bd3_scale.data.sources import DocumentReader, FilePart
from bd3_scale.registry import source_cuts

# Of source files as stored: a minute's work or a few, of which at most one sequence is lost.
TASK_BYTES = 1 << 28

Task = tuple[FilePart, ...]


def cut(reader: DocumentReader) -> list[Task]:
    """Return the tasks of a reader's files, in order: runs of files and of parts of files, of about `TASK_BYTES`.

    A file above that is cut where its format can be, see `source_cuts`; else it is one task, or the end of one.
    """
    tasks: list[list[FilePart]] = [[]]
    for number, file in enumerate(reader.files):
        for part in _parts(number, file):
            if tasks[-1] and sum(other.num_bytes for other in tasks[-1]) + part.num_bytes > TASK_BYTES:
                tasks.append([])
            tasks[-1] = _joined([*tasks[-1], part])
    return [tuple(task) for task in tasks]


def _parts(number: int, file: Path) -> Iterator[FilePart]:
    size = file.stat().st_size
    kind = format_of(file)
    is_packed = file.name.lower().endswith(PACKINGS[1:])
    if size <= TASK_BYTES or is_packed or kind not in source_cuts.names():
        yield FilePart(number, size)
        return
    for part, num_bytes in source_cuts.get(kind)(file, TASK_BYTES):
        yield FilePart(number, num_bytes, part)


def _joined(parts: list[FilePart]) -> list[FilePart]:
    """Return them with the last two as one where they follow each other in a file."""
    *before, last = parts
    if before and last.part and before[-1].file == last.file and before[-1].part:
        joined = (before[-1].part[0], last.part[1])
        return [*before[:-1], FilePart(last.file, before[-1].num_bytes + last.num_bytes, joined)]
    return parts
