"""Read documents from `.json`: a list of objects, a single object, or JSON Lines under that suffix."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator

from bd3_scale.data.sources import BYTE_ORDER_MARK, READ_BYTES, JsonLine, OpenFile, lines, whole
from bd3_scale.registry import source_formats

BLANK = b" \t\r\n"
# Commas separate values only at the list's own level (depth 1).
_BETWEEN, _INSIDE = re.compile(rb'["\[\]{},]'), re.compile(rb'["\[\]{}]')


@source_formats.register(".json")
def json_file(source: OpenFile) -> Iterator[JsonLine]:
    """Yield the values of a list, counted from 0; or the lines, if the first holds a whole object; or a single object.

    One value or line is in memory at a time.
    """
    stream = io.BufferedReader(source.stream, READ_BYTES)  # type: ignore[type-var]
    source = source._replace(stream=stream)
    if stream.peek(1).removeprefix(BYTE_ORDER_MARK).lstrip(BLANK).startswith(b"["):
        yield from _values(source)
        return
    read = (line for line in lines(source) if line.data.strip())
    first = next(read, None)
    if first is None:
        return
    if first.data.rstrip().endswith(b"}"):
        yield from (JsonLine(*line) for line in itertools.chain([first], read))
        return
    (rest,) = whole(source)
    yield JsonLine(str(source.file), first.data + b"\n" + rest.data, first.start, source.max_bytes)


def _values(source: OpenFile) -> Iterator[JsonLine]:
    """Yield the values of a list as bytes; a value above the limit is cut.

    ValueError: the list does not end, or something follows it.
    """
    file, kept = source.file, source.max_bytes + 1
    chunks = iter(lambda: source.stream.read(READ_BYTES), b"")
    data = bytearray()
    offset = number = depth = begin = at = 0
    in_string = False
    for chunk in chunks:
        data += chunk
        while True:
            if in_string:
                quote = data.find(b'"', at)
                end = len(data) if quote < 0 else quote
                is_escaped = (end - at - len(data[at:end].rstrip(b"\\"))) % 2 == 1
                at = end - is_escaped if quote < 0 else quote + 1
                if quote < 0:
                    break
                in_string = is_escaped
                continue
            mark = (_BETWEEN if depth == 1 else _INSIDE).search(data, at)
            if mark is None:
                at = len(data)
                break
            at, kind = mark.end(), mark[0]
            in_string = kind == b'"'
            depth += (kind in b"[{") - (kind in b"]}")
            if kind == b"," or depth == 0:
                value = data[begin : at - 1]
                if value.strip() or kind == b"," or number:
                    yield JsonLine(f"{file}, value {number}", value, offset + begin, source.max_bytes)
                number += 1
            if depth == 0:
                if data[at:].strip(BLANK) or any(more.strip(BLANK) for more in chunks):
                    raise ValueError(f"{file} has text after the end of its list: give each object a line, as .jsonl")
                return
            if kind == b"," or (kind == b"[" and depth == 1):
                begin = at
        del data[:begin]
        offset, at, begin = offset + begin, at - begin, 0
        if at > kept:
            del data[kept:at]
            offset, at = offset + at - kept, kept
    raise ValueError(f"{file} is damaged or cut short (its list does not end): copy or make it again")
