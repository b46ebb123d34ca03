"""Read documents from files and folders: `.txt` (one a file), `.jsonl` (one a line) and the other registered formats.

A format is a function that yields the pieces of an `OpenFile`, each of which is a document or holds one. It is
registered under the suffix of its files with `@source_formats.register(".suffix")`. It raises ValueError if the rest
of a file is damaged.

A format whose files can be cut into parts also registers a function with `@source_cuts.register(".suffix")`. That gets
the file and a number of bytes, and yields parts of about that size, in order: a start and an end in the format's own
unit (bytes, row groups), and the part's bytes as stored. The format then yields what begins in `OpenFile.part`, or
everything if that is None. Compressed files are never cut.
"""

from __future__ import annotations

import copy
import gc
import gzip
import io
import json
import logging
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

import zstandard

from bd3_scale.data.fields import check_unicode, kind_of, text_in
from bd3_scale.data.files import PACKINGS, find_files, format_of
from bd3_scale.data.remote_files import SourceFile
from bd3_scale.data.zstd import ZstdFile
from bd3_scale.registry import source_cuts, source_formats

READ_BYTES = 1 << 17
# JSON values and tokenised text take a hundred times their bytes in memory, and more.
DOCUMENT_BYTES = 1 << 27
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MAX_MESSAGES = 5
RECORD_FORMATS = (".jsonl", ".json", ".parquet", ".arrow")

TextOf = Callable[[dict[str, Any], str], str]
Part = tuple[int, int]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Document:
    """`text`, and how many bytes of the source files, as stored, were read when it was complete."""

    text: str
    position: int


class FilePart(NamedTuple):
    """A part of the `file`-th source file, `num_bytes` as stored; the whole file if `part` is None."""

    file: int
    num_bytes: int
    part: Part | None = None


@dataclass(frozen=True)
class LeftOut:
    """Counts of the documents that were empty or could not be read, and the messages of the first of those."""

    empty: int = 0
    skipped: int = 0
    first: tuple[str, ...] = ()

    def __add__(self, other: LeftOut) -> LeftOut:
        """Return the sum of both."""
        first = (*self.first, *other.first)[:MAX_MESSAGES]
        return LeftOut(self.empty + other.empty, self.skipped + other.skipped, first)

    def log(self) -> None:
        """Log the numbers and the messages."""
        if self.empty:
            logger.warning("%d documents without a visible character were left out", self.empty)
        if self.skipped:
            first = "".join(f"\n  - {message}" for message in self.first)
            logger.warning("%d that cannot be read were skipped, the first of them:%s", self.skipped, first)


class DocumentReader:
    """The documents of `sources` in order; `find_files` describes the sources.

    Reading streams: one document is in memory at a time. Documents without a visible character are left out.
    `num_documents`, `num_empty` and `num_skipped` count what was read so far; `skipped` holds the first messages.

    Args:
        field: the field of a record, such as a line's JSON object, that holds the text; `a.b` is the field b of the
            object a, unless there is a field named `a.b`.
        on_error: "skip" leaves out what cannot be read: a line, a `.txt` file, or the rest of a damaged file.
        text_of: makes a document from a record, which has at least `field`, and from its place; it raises ValueError
            with the place. Then only files of `RECORD_FORMATS` are read.
        max_bytes: limit of a document, or of its line of JSON.

    Raises FileNotFoundError and ValueError as `find_files`. While iterating with "stop", raises ValueError for a
    damaged file, text that is not UTF-8, a line that is not a JSON object with the text, and a document above
    `max_bytes`.
    """

    def __init__(
        self,
        sources: Sequence[str | Path],
        field: str = "text",
        on_error: Literal["stop", "skip"] = "stop",
        text_of: TextOf | None = None,
        max_bytes: int = DOCUMENT_BYTES,
    ) -> None:
        self.files = find_files(sources, RECORD_FORMATS if text_of else None)
        self._parts: Sequence[FilePart] | None = None
        self._text_of = text_of or partial(text_in, field)
        self._field = field
        self._on_error, self._max_bytes = on_error, max_bytes
        self._reset()

    def only(self, parts: Sequence[FilePart]) -> DocumentReader:
        """Return a reader of these parts of the files alone. It can be pickled if `text_of` can."""
        reader = copy.copy(self)
        reader._parts = parts
        reader._reset()
        return reader

    @property
    def parts(self) -> Sequence[FilePart]:
        """Return the parts that are read: whole source files by default."""
        return self._parts or [FilePart(number, file.stat().st_size) for number, file in enumerate(self.files)]

    def cut(self, num_bytes: int) -> Iterator[FilePart]:
        """Yield the parts; files above `num_bytes` are cut into parts of about that size if their format allows it."""
        for whole in self.parts:
            file = self.files[whole.file]
            kind, is_packed = format_of(file), file.name.lower().endswith(PACKINGS[1:])
            if whole.num_bytes > num_bytes and kind in source_cuts.names() and not is_packed:
                for part, size in source_cuts.get(kind)(file, num_bytes):
                    yield FilePart(whole.file, size, part)
            else:
                yield whole

    @property
    def modules(self) -> set[str]:
        """Return the modules of its formats by name, which worker processes must import."""
        return {source_formats.get(format_of(file)).__module__ for file in self.files}

    @property
    def num_bytes(self) -> int:
        """Return the size of what is read, as stored."""
        return sum(part.num_bytes for part in self.parts)

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents in order."""
        self._reset()
        before = 0
        for number, num_bytes, part in self.parts:
            file = self.files[number]
            with file.open("rb") as raw:
                for text in self._texts(file, raw, part):
                    if text.isspace() or not text:
                        self.num_empty += 1
                    else:
                        self.num_documents += 1
                        read = raw.tell() - (part[0] if part else 0)
                        yield Document(text, before + min(read, num_bytes))
            before += num_bytes

    @property
    def left_out(self) -> LeftOut:
        """Return what was left out so far."""
        return LeftOut(empty=self.num_empty, skipped=self.num_skipped, first=tuple(self.skipped))

    def _reset(self) -> None:
        self.num_documents = self.num_empty = self.num_skipped = 0
        self.skipped: list[str] = []

    def _texts(self, file: SourceFile, raw: BinaryIO, part: Part | None) -> Iterator[str]:
        pieces = _pieces(file, raw, self._max_bytes, part, self._field)
        while True:
            try:
                piece = next(pieces, None)
                if piece is None:
                    return
                text = piece.document(self._text_of)
            except ValueError as error:
                if self._on_error == "stop":
                    raise
                self.num_skipped += 1
                self.skipped += [str(error)] * (self.num_skipped <= MAX_MESSAGES)
            else:
                yield text


class OpenFile(NamedTuple):
    """An open file: `stream` has its unpacked bytes, a document may have `max_bytes`; `part`: see the module.

    Only `field` of a record is needed.
    """

    file: SourceFile
    stream: BinaryIO
    max_bytes: int
    part: Part | None = None
    field: str = "text"


class Record(NamedTuple):
    """Named fields, one of which holds the text; messages begin with its place, `where`."""

    where: str
    fields: dict[str, Any]

    def document(self, text_of: TextOf) -> str:
        """Return the text. Raises ValueError if there is none."""
        text = text_of(self.fields, self.where)
        check_unicode(text, self.where)
        return text


class Piece(NamedTuple):
    """UTF-8 text: a line of a file without its end, or a whole file; `start` is the offset in the unpacked file.

    If the text is longer than `max_bytes`, `data` is only a part of it.
    """

    where: str
    data: bytes | bytearray
    start: int
    max_bytes: int

    def document(self, text_of: TextOf) -> str:
        """Return the text itself; see `text`."""
        return self.text()

    def text(self) -> str:
        """Return the text. Raises ValueError if it is not UTF-8 or is too long."""
        if len(self.data) > self.max_bytes:
            raise ValueError(too_long(self.where, self.max_bytes))
        try:
            return self.data.decode("utf-8")
        except UnicodeDecodeError as error:
            byte, offset = self.data[error.start], self.start + error.start
            raise ValueError(
                f"{self.where} is not UTF-8 text (the byte 0x{byte:02x} at offset {offset:,} of the file's text); "
                "convert it first"
            ) from error

    def record(self) -> dict[str, Any]:
        """Return the JSON object. Raises ValueError if there is none."""
        text = self.text()
        try:
            value = _decoded(text)
        except json.JSONDecodeError as error:
            if error.msg == "Extra data":
                rest = text[error.pos : error.pos + 20]
                raise ValueError(
                    f"{self.where} holds more than one JSON value ({rest!r} follows the first); give each its own line"
                ) from error
            raise ValueError(f"{self.where} is not JSON ({error.msg} at character {error.pos + 1})") from error
        except RecursionError:
            raise ValueError(f"{self.where} is nested too deeply to be read; leave out what is not text") from None
        except MemoryError:
            raise ValueError(f"{self.where} needs more memory than is available; leave out what is not text") from None
        if not isinstance(value, dict):
            raise ValueError(f"{self.where} holds {kind_of(value)}; a JSON object is needed")
        return value


def too_long(where: str, max_bytes: int) -> str:
    """Return the message for a document above `max_bytes`."""
    return (
        f"{where} is longer than the {max_bytes:,} bytes that a document may have; split it, or raise the limit with "
        "--max-document-mib of `data prepare` and `data tokenizer`"
    )


class JsonLine(Piece):
    """A line with a JSON object, whose text is in a field."""

    def document(self, text_of: TextOf) -> str:
        """Return the text in the object's field. Raises ValueError if there is none."""
        return Record(self.where, self.record()).document(text_of)


@source_formats.register(".txt")
def whole(source: OpenFile) -> Iterator[Piece]:
    """Yield the file as one piece without byte order mark; if it is too long, a part of it."""
    data = bytearray()
    while len(data) <= source.max_bytes + len(BYTE_ORDER_MARK) and (more := source.stream.read(READ_BYTES)):
        data += more
    mark = _mark(data)
    del data[:mark]
    yield Piece(str(source.file), data, mark, source.max_bytes)


@source_formats.register(".jsonl")
def json_lines(source: OpenFile) -> Iterator[JsonLine]:
    """Yield the lines that are not blank; see `lines`."""
    return (JsonLine(*line) for line in lines(source) if line.data.strip())


@source_cuts.register(".jsonl")
def byte_ranges(file: SourceFile, num_bytes: int) -> Iterator[tuple[Part, int]]:
    """Yield parts of a file of lines. A line belongs to the part in which it begins, so cuts need not fit lines."""
    size = file.stat().st_size
    for start in range(0, size, num_bytes):
        end = min(start + num_bytes, size)
        yield (start, end), end - start


def lines(source: OpenFile) -> Iterator[Piece]:
    """Yield the lines of a file, or those that begin in its part.

    A line ends at a newline, with or without a carriage return, and nowhere else. A byte order mark at the beginning of
    the file is left out. If a line is too long, a part of it is yielded. Only lines of the first part have numbers.
    """
    file, stream, max_bytes, part, _ = source
    first, last = part or (0, sys.maxsize)
    start = number = 0
    if first:
        stream.seek(first - 1)
        start = first - 1 + _rest_of_line(stream)
    while start < last and (line := stream.readline(max_bytes + len(BYTE_ORDER_MARK) + 1)):
        number += 1
        mark = _mark(line) if start == 0 else 0
        end = 2 if line.endswith(b"\r\n") else line.endswith(b"\n")
        where = f"{file}, the line at byte {start:,}" if first else f"{file}:{number}"
        yield Piece(where, line[mark : len(line) - end], start + mark, max_bytes)
        start += len(line) + (0 if end else _rest_of_line(stream))


def _rest_of_line(stream: BinaryIO) -> int:
    """Read up to the end of a line; return how many bytes were read."""
    size = 0
    while line := stream.readline(READ_BYTES):
        size += len(line)
        if line.endswith(b"\n"):
            break
    return size


def _pieces(file: SourceFile, raw: BinaryIO, max_bytes: int, part: Part | None, field: str) -> Iterator[Piece | Record]:
    with unpacked(file, raw, max_bytes) as source:
        yield from source_formats.get(format_of(file))(source._replace(part=part, field=field))


def _mark(data: bytes | bytearray) -> int:
    return len(BYTE_ORDER_MARK) if data.startswith(BYTE_ORDER_MARK) else 0


@contextmanager
def unpacked(file: SourceFile, raw: BinaryIO, max_bytes: int = DOCUMENT_BYTES) -> Iterator[OpenFile]:
    """Yield the unpacked content of `file`, opened as `raw`. Raises ValueError if it turns out to be damaged."""
    name = file.name.lower()
    stream = raw
    if name.endswith(".gz"):
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if name.endswith(".zst"):
        stream = io.BufferedReader(ZstdFile(raw), READ_BYTES)
    try:
        yield OpenFile(file, stream, max_bytes)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error}); convert it first") from error
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise ValueError(f"{file} is damaged or cut short ({error}); copy or make it again") from error
    except MemoryError:
        raise ValueError(f"{file} needs more memory than is available; give more, or split its documents") from None


def _integer(digits: str) -> int | Decimal:
    try:
        return int(digits)
    except ValueError:  # Python refuses to parse integers of more than 4,300 digits
        return Decimal(digits)


_JSON = json.JSONDecoder(parse_int=_integer)


def _decoded(text: str) -> Any:
    """Return the JSON value. Garbage collection is off: it would search millions of new lists again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return _JSON.decode(text)
    finally:
        if was_enabled:
            gc.enable()
