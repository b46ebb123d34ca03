"""Cut a preparation into tasks, which depend on the source files alone, not on who does them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from bd3_scale.data.index import INDEX_LIMIT
from bd3_scale.data.manifest import Counts, Manifest, SplitName
from bd3_scale.data.sources import DocumentReader, FilePart, LeftOut
from bd3_scale.resilience.readers import read_regular, reader

PLAN_FILE = "plan.json"
RESULT_FILE = "task.json"
# Size of a task's sources as stored: ten seconds to a minute of work. Each task leaves one sequence incomplete.
TASK_BYTES = 1 << 27


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Task(_Frozen):
    """Parts of the files of one reader; `reader` is its number."""

    reader: int
    parts: tuple[FilePart, ...]

    @property
    def num_bytes(self) -> int:
        """Return the size as stored."""
        return sum(part.num_bytes for part in self.parts)


class Result(_Frozen):
    """The result of a task: the documents that it left out, and the splits that it wrote."""

    left_out: LeftOut
    splits: dict[SplitName, Counts]


class Plan(_Frozen):
    """The requested data, as a manifest without counts, and the tasks of the work."""

    asked: Manifest
    chat_template: str
    tasks: tuple[Task, ...]


@reader("the plan of a preparation")
def read_plan(path: Path) -> Plan:
    """Return the plan in a file. ValueError: it is invalid."""
    return Plan.model_validate_json(read_regular(path, INDEX_LIMIT))


@reader("the result of a task")
def read_result(path: Path) -> Result:
    """Return the result in a file. ValueError: it is invalid."""
    return Result.model_validate_json(read_regular(path))


def cut(number: int, documents: DocumentReader) -> Iterator[Task]:
    """Yield the tasks of reader `number`: runs of files and of parts of files, of about `TASK_BYTES`.

    A larger file is cut if its format allows it, see `source_cuts`; otherwise one task reads all of it.
    """
    parts: list[FilePart] = []
    num_bytes = 0
    for part in documents.cut(TASK_BYTES):
        if parts and num_bytes + part.num_bytes > TASK_BYTES:
            yield Task(reader=number, parts=tuple(parts))
            parts, num_bytes = [], 0
        num_bytes += part.num_bytes
        _add(parts, part)
    yield Task(reader=number, parts=tuple(parts))


def _add(parts: list[FilePart], part: FilePart) -> None:
    """Append a part, or extend the last part if this one continues it."""
    last = parts[-1] if parts else None
    if last and last.file == part.file and last.part and part.part:
        parts[-1] = FilePart(part.file, last.num_bytes + part.num_bytes, (last.part[0], part.part[1]))
    else:
        parts.append(part)
