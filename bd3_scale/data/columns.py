"""Documents in a column of Parquet (`.parquet`) or of Arrow as `datasets` saves it (`.arrow`); one column is read.

Rows are counted from 0. What a file says of its own sizes is not believed: a kilobyte of it may stand for a terabyte.
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

# Rows that are decoded at a time should have so many bytes, and are no more than that.
BATCH_BYTES = 1 << 26
BATCH_ROWS = 1 << 10
# What decoding them may take.
MEMORY_BYTES = 1 << 32
# Of a column, so many bytes are fetched at a time.
READ_BYTES = 1 << 20
FEATHER = b"ARROW1\0\0"
# The number of a message's field, in Arrow's format.
_BODY_LENGTH = 3


class Cell(NamedTuple):
    """A row's value in the column of the wanted field, as a scalar of Arrow of `num_bytes`."""

    where: str
    field: str
    value: Any
    num_bytes: int
    max_bytes: int

    def document(self, text_of: TextOf) -> str:
        """Return the text. Raises ValueError where there is none, or more than `max_bytes`."""
        if self.num_bytes > self.max_bytes:
            raise ValueError(too_long(self.where, self.max_bytes))
        try:
            value = self.value.as_py()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.where} is not UTF-8 text ({error}); convert it first") from error
        return Record(self.where, {self.field: value}).document(text_of)


@source_formats.register(".parquet")
def parquet_rows(source: OpenFile) -> Iterator[Cell]:
    """Yield the rows of a Parquet file, of its part those of its row groups; pages are decoded as they are needed."""
    import pyarrow.parquet

    with source.file.open("rb") as raw, _damage_told(source.file):
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
                # How far it stands behind the part's beginning tells what was read.
                source.stream.seek(first + read + int(done * _stored_bytes(group)))
                yield from _cells(source, batch, row)
                row += batch.num_rows
            read += _stored_bytes(group)


@source_cuts.register(".parquet")
def row_groups(file: SourceFile, num_bytes: int) -> Iterator[tuple[Part, int]]:
    """Yield the row groups of a Parquet file, each with its bytes as stored."""
    import pyarrow.parquet

    with file.open("rb") as raw, _damage_told(file):
        with limited_memory(MEMORY_BYTES):
            metadata = pyarrow.parquet.read_metadata(raw)
        for number in range(metadata.num_row_groups):
            yield (number, number + 1), _stored_bytes(metadata.row_group(number))


@source_formats.register(".arrow")
def arrow_rows(source: OpenFile) -> Iterator[Cell]:
    """Yield the rows of a stream of Arrow's record batches, or of a file of Feather's second version, batch by batch.

    Of its part, those of the batches that begin there; their rows are counted from that of the part.
    """
    import pyarrow

    file, stream = source.file, source.stream
    with _damage_told(file):
        stream.seek(_start(stream))
        schema = pyarrow.ipc.read_schema(_message(stream))
        _path(file, schema, source.field)
        first, last = source.part or (0, file.stat().st_size)
        if first:
            stream.seek(first)
        rows = f"{file}, behind byte {first:,}" if first else str(file)
        number = 0
        while stream.tell() < last and (message := _message(stream)):
            if message.type != "record batch":
                raise ValueError(f"{file} has a {message.type}, which is not read here: write it as Parquet")
            with limited_memory(MEMORY_BYTES):
                batch = pyarrow.ipc.read_record_batch(message, schema)
                batch.validate(full=True)  # what it says of places could lead out of the memory that it has
            yield from _cells(source, batch, number, rows)
            number += batch.num_rows


@source_cuts.register(".arrow")
def record_batches(file: SourceFile, num_bytes: int) -> Iterator[tuple[Part, int]]:
    """Yield the record batches of an Arrow file by their bytes, the first with the schema before it."""
    with file.open("rb") as raw, _damage_told(file):
        num_bytes = file.stat().st_size
        ends = _ends(raw, num_bytes)[1:-1]  # behind the schema, and none behind the last batch
        for start, end in itertools.pairwise([0, *ends, num_bytes]):
            yield (start, end), end - start


def _ends(stream: BinaryIO, num_bytes: int) -> list[int]:
    """Return where each message of an Arrow stream ends, from what stands before their bodies.

    EOFError: one does not end in the file.
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
    """Return it from a message's flatbuffer: where fields are in a table stands in a list so far before the table."""
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
    """Return the names on the way to a field. ValueError: there is no such column, or none of text or lists."""
    import pyarrow

    around, prefix, found = schema, "", None
    path = [field] if field in schema.names else field.split(".")
    for name in path:
        number = around.get_field_index(name)
        found = None if number < 0 else around.field(number)
        if found is None:
            break
        if pyarrow.types.is_struct(found.type):
            around, prefix = found.type, f"{prefix}{name}."
    else:
        assert found is not None
        if not (pyarrow.types.is_primitive(found.type) or pyarrow.types.is_binary(found.type)):
            return path
    beside = [_listed(field, prefix) for field in around]
    columns = ", ".join(beside[:NUM_SHOWN]) + ", …" * (len(beside) > NUM_SHOWN)
    if found is None:
        raise ValueError(f'{file} has no column "{field}" but {columns}: {NAME_A_FIELD}')
    raise ValueError(
        f'{file} has {found.type} in the column "{field}", no text; the columns are {columns}: {NAME_A_FIELD}'
    )


def _listed(field: Any, prefix: str) -> str:
    name = field.name if field.name.isprintable() else repr(field.name)
    kind = str(field.type).partition("<")[0]
    return f"{prefix}{name} ({kind})"


def _sizes(array: Any) -> NDArray[np.int64]:
    """Return how many bytes of text, and about how many of other things, each value of an array has: [rows].

    Where one value stands for many rows, the array itself has much less. ValueError: values that are not read.
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
        raise ValueError(f"{str(kind).partition('<')[0]} is not read: write it as lists and structs")
    return np.ones(len(array), np.int64)


def _stored_bytes(group: Any) -> int:
    return sum(group.column(number).total_compressed_size for number in range(group.num_columns))


@contextmanager
def _damage_told(file: SourceFile) -> Iterator[None]:
    """Turn what pyarrow says of a damaged file inside the block into a ValueError of one line."""
    import pyarrow

    try:
        yield
    except MemoryError as error:
        raise ValueError(
            f"{file} needs more than {MEMORY_BYTES >> 30} GiB of memory for a few rows: divide its documents, or write "
            "it in smaller pages and batches"
        ) from error
    except (pyarrow.ArrowException, struct.error, EOFError, OSError) as error:
        # Pyarrow's own has no number; what the system and remote storage say has one, or a class of its own.
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise
        raise ValueError(f"{file} is damaged or cut short ({in_one_line(error)}); copy or make it again") from error
