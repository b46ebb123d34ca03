"""Read documents from a column of Parquet (`.parquet`), or of Arrow files as `datasets` saves them (`.arrow`).

Rows are counted from 0. The sizes that a file states are not trusted: a kilobyte of it may unpack to a terabyte.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bd3_scale.data.fields import NAME_A_FIELD, NUM_SHOWN
from bd3_scale.data.remote_files import SourceFile
from bd3_scale.data.sources import OpenFile, Part, Record, TextOf, too_long
from bd3_scale.registry import source_cuts, source_formats
from bd3_scale.resilience.limits import limited_memory
from bd3_scale.resilience.readers import in_one_line

# Rows are decoded in batches of about this many bytes, and of at most this many rows.
BATCH_BYTES = 1 << 26
BATCH_ROWS = 1 << 10
# The memory limit for decoding a batch.
MEMORY_BYTES = 1 << 32
# How much of a column is fetched at a time.
READ_BYTES = 1 << 20
FEATHER = b"ARROW1\0\0"
# The id of the field bodyLength in the table Message of Arrow's Message.fbs.
_BODY_LENGTH = 3


class Cell(NamedTuple):
    """The value of a row in the wanted column: an Arrow scalar of `num_bytes`."""

    where: str
    field: str
    value: Any
    num_bytes: int
    max_bytes: int

    def document(self, text_of: TextOf) -> str:
        """Return the text. Raises ValueError if there is none, or it has more than `max_bytes`."""
        if self.num_bytes > self.max_bytes:
            raise ValueError(too_long(self.where, self.max_bytes))
        try:
            value = self.value.as_py()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.where} is not UTF-8 text ({error}); convert it first") from error
        return Record(self.where, {self.field: value}).document(text_of)


@source_formats.register(".parquet")
def parquet_rows(source: OpenFile) -> Iterator[Cell]:
    """Yield the rows of a Parquet file, or those of the row groups of its part; pages are decoded as needed."""
    import pyarrow.parquet

    with source.file.open("rb") as raw, _damage_as_value_error(source.file):
        with limited_memory(MEMORY_BYTES):
            file = pyarrow.parquet.ParquetFile(raw, pre_buffer=False, buffer_size=READ_BYTES)
        _path(source.file, file.schema_arrow, source.field)
        first, last = source.part or (0, file.metadata.num_row_groups)
        row = sum(file.metadata.row_group(number).num_rows for number in range(first))
        read = 0
        for number in range(first, last):
            group, begin = file.metadata.row_group(number), row
            rows = min(max(BATCH_BYTES * group.num_rows // max(group.total_byte_size, 1), 1), BATCH_ROWS)
            batches = file.iter_batches(rows, [number], [source.field], use_threads=False)
            while (batch := _next(batches)) is not None:
                done = (row - begin + batch.num_rows) / max(group.num_rows, 1)
                # pyarrow reads in an order of its own; this position, relative to the part, drives the progress bar.
                source.stream.seek(first + read + int(done * _stored_bytes(group)))
                yield from _cells(source, batch, row)
                row += batch.num_rows
            read += _stored_bytes(group)


@source_cuts.register(".parquet")
def row_groups(file: SourceFile, num_bytes: int) -> Iterator[tuple[Part, int]]:
    """Yield the row groups of a Parquet file, each with its size as stored."""
    import pyarrow.parquet

    with file.open("rb") as raw, _damage_as_value_error(file):
        with limited_memory(MEMORY_BYTES):
            metadata = pyarrow.parquet.read_metadata(raw)
        for number in range(metadata.num_row_groups):
            yield (number, number + 1), _stored_bytes(metadata.row_group(number))


@source_formats.register(".arrow")
def arrow_rows(source: OpenFile) -> Iterator[Cell]:
    """Yield the rows of Arrow's stream format, or of a Feather V2 file, record batch by record batch.

    Of a part, only batches that begin in it are read; their rows are counted from the part's first row.
    """
    import pyarrow

    file, stream = source.file, source.stream
    with _damage_as_value_error(file):
        stream.seek(_start(stream))
        schema = pyarrow.ipc.read_schema(_message(stream))
        _path(file, schema, source.field)
        first, last = source.part or (0, file.stat().st_size)
        if first:
            stream.seek(first)
        rows = f"{file}, after byte {first:,}" if first else str(file)
        number = 0
        while stream.tell() < last and (message := _message(stream)):
            if message.type != "record batch":
                raise ValueError(f"{file} has a {message.type}, which cannot be read here: save it as Parquet")
            with limited_memory(MEMORY_BYTES):
                batch = pyarrow.ipc.read_record_batch(message, schema)
                batch.validate(full=True)  # untrusted offsets could point outside the batch's memory
            yield from _cells(source, batch, number, rows)
            number += batch.num_rows


@source_cuts.register(".arrow")
def record_batches(file: SourceFile, num_bytes: int) -> Iterator[tuple[Part, int]]:
    """Yield the record batches of an Arrow file as byte ranges; the first one includes the schema."""
    with file.open("rb") as raw, _damage_as_value_error(file):
        num_bytes = file.stat().st_size
        ends = _ends(raw, num_bytes)[1:-1]  # without the schema's end and the file's last batch
        for start, end in itertools.pairwise([0, *ends, num_bytes]):
            yield (start, end), end - start


def _ends(stream: BinaryIO, num_bytes: int) -> list[int]:
    """Return the end of each message of an Arrow stream, read from the sizes before the messages.

    EOFError: a message does not end within the file.
    """
    ends: list[int] = []
    place = _start(stream)
    while place < num_bytes:
        stream.seek(place)
        _, size = struct.unpack("<iI", stream.read(8))
        if not size:
            break
        metadata = stream.read(min(size, MEMORY_BYTES))
        place += 8 + size + _body_length(metadata)
        if not (ends[-1] if ends else 0) < place <= num_bytes:
            raise EOFError(f"a batch ends at byte {place:,} of {num_bytes:,}")
        ends.append(place)
    return ends


def _start(stream: BinaryIO) -> int:
    stream.seek(0)
    return len(FEATHER) if stream.read(len(FEATHER)) == FEATHER else 0


def _body_length(metadata: bytes) -> int:
    """Return the body's size from a message's flatbuffer: its table begins with the distance to the list of offsets."""
    (table,) = struct.unpack_from("<I", metadata)
    places = table - struct.unpack_from("<i", metadata, table)[0]
    (size,) = struct.unpack_from("<H", metadata, places)
    number = 4 + 2 * _BODY_LENGTH
    place = struct.unpack_from("<H", metadata, places + number)[0] if number < size else 0
    return int(struct.unpack_from("<q", metadata, table + place)[0]) if place else 0


def _message(stream: BinaryIO) -> Any:
    """Return the next message of an Arrow stream, or None at its end."""
    import pyarrow

    try:
        with limited_memory(MEMORY_BYTES):
            return pyarrow.ipc.read_message(stream)
    except EOFError:
        return None


def _next(batches: Iterator[Any]) -> Any:
    with limited_memory(MEMORY_BYTES):
        return next(batches, None)


def _cells(source: OpenFile, batch: Any, first_row: int, rows: str = "") -> Iterator[Cell]:
    import pyarrow.compute

    first, *inner = _path(source.file, batch.schema, source.field)
    column = batch.column(batch.schema.names.index(first))
    for name in inner:
        column = pyarrow.compute.struct_field(column, [column.type.get_field_index(name)])
    try:
        sizes = _sizes(column).tolist()
    except ValueError as error:
        raise ValueError(f'{source.file}, column "{source.field}": {error}') from error
    for number, (value, num_bytes) in enumerate(zip(column, sizes, strict=True), first_row):
        yield Cell(f"{rows or source.file}, row {number}", source.field, value, num_bytes, source.max_bytes)


def _path(file: SourceFile, schema: Any, field: str) -> list[str]:
    """Return the names on the path to a field. ValueError: no such column, or one that holds neither text nor lists."""
    import pyarrow

    around, prefix, column = schema, "", None
    path = [field] if field in schema.names else field.split(".")
    for name in path:
        number = around.get_field_index(name)
        column = None if number < 0 else around.field(number)
        if column is None:
            break
        if pyarrow.types.is_struct(column.type):
            around, prefix = column.type, f"{prefix}{name}."
    else:
        assert column is not None
        if not (pyarrow.types.is_primitive(column.type) or pyarrow.types.is_binary(column.type)):
            return path
    siblings = [_listed(field, prefix) for field in around]
    columns = ", ".join(siblings[:NUM_SHOWN]) + ", …" * (len(siblings) > NUM_SHOWN)
    if column is None:
        raise ValueError(f'{file} has no column "{field}" but {columns}: {NAME_A_FIELD}')
    raise ValueError(
        f'{file} has {column.type} in the column "{field}", not text; the columns are {columns}: {NAME_A_FIELD}'
    )


def _listed(field: Any, prefix: str) -> str:
    name = field.name if field.name.isprintable() else repr(field.name)
    kind = str(field.type).partition("<")[0]
    return f"{prefix}{name} ({kind})"


def _sizes(array: Any) -> NDArray[np.int64]:
    """Return the size of each value of an array, int64 [rows]: bytes of text, and roughly that of other types.

    One stored value may stand for many rows (dictionaries), so the array's own size says nothing. ValueError: values
    of a type that cannot be read.
    """
    import pyarrow
    import pyarrow.compute as compute

    kinds, kind = pyarrow.types, array.type
    if isinstance(array, pyarrow.ExtensionArray):
        return _sizes(array.storage)
    if kinds.is_dictionary(kind):
        sizes = np.append(_sizes(array.dictionary), 0)
        return sizes[array.indices.fill_null(len(sizes) - 1).to_numpy()]
    if kinds.is_string_view(kind) or kinds.is_binary_view(kind):
        lengths = np.frombuffer(array.buffers()[1], np.int32)[4 * array.offset :: 4][: len(array)]
        return np.where(array.is_valid(), lengths, 0).astype(np.int64)
    if any(test(kind) for test in (kinds.is_string, kinds.is_large_string, kinds.is_binary, kinds.is_large_binary)):
        return compute.binary_length(array).fill_null(0).to_numpy().astype(np.int64)
    if kinds.is_struct(kind):
        return sum((_sizes(part) for part in array.flatten()), np.ones(len(array), np.int64))
    if kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind):
        parents = compute.list_parent_indices(array).to_numpy()
        return np.bincount(parents, 1 + _sizes(array.flatten()), len(array)).astype(np.int64)
    if kinds.is_nested(kind):
        raise ValueError(f"{str(kind).partition('<')[0]} cannot be read: save it as lists and structs")
    return np.ones(len(array), np.int64)


def _stored_bytes(group: Any) -> int:
    return sum(group.column(number).total_compressed_size for number in range(group.num_columns))


@contextmanager
def _damage_as_value_error(file: SourceFile) -> Iterator[None]:
    """Turn pyarrow's errors about a damaged file inside the block into a ValueError of one line."""
    import pyarrow

    try:
        yield
    except MemoryError as error:
        raise ValueError(
            f"{file} needs more than {MEMORY_BYTES >> 30} GiB of memory for a few rows: split its documents, or save "
            "it with smaller pages and batches"
        ) from error
    except (pyarrow.ArrowException, struct.error, EOFError, OSError) as error:
        # pyarrow's own OSErrors have no errno; those of the system have one, and remote storage uses subclasses.
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise
        raise ValueError(f"{file} is damaged or cut short ({in_one_line(error)}); copy or make it again") from error
