"""Test documents in `.json`, which has three forms under one suffix."""

from __future__ import annotations

import gzip
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_scale.data import json_values
from bd3_scale.data.sources import DocumentReader, OpenFile

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text('ab"\\[]{},: \n é'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('ab"\\{[', max_size=3), inner, max_size=3),
    max_leaves=8,
)


def texts(path: Path, **options: Any) -> list[str]:
    return [document.text for document in DocumentReader([path], **options)]


@settings(max_examples=150)
@given(st.lists(VALUES), st.sampled_from([None, 0, 3]), st.booleans(), st.integers(3, 9), st.sampled_from(["", " \n"]))
def test_the_values_of_a_list_are_those_that_json_reads(
    values: list[Any], indent: int | None, ascii_alone: bool, chunk: int, around: str
) -> None:
    """Check it for any division of a file into chunks."""
    data = (around + json.dumps(values, indent=indent, ensure_ascii=ascii_alone) + around).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_values, "READ_BYTES", chunk)
        pieces = list(json_values.json_file(OpenFile(Path("t.json"), io.BytesIO(data), 1 << 20)))
    assert [json.loads(piece.data) for piece in pieces] == values
    assert [piece.where for piece in pieces] == [f"t.json, value {number}" for number in range(len(values))]
    assert all(data[piece.start :].startswith(bytes(piece.data)) for piece in pieces)


def test_a_list_lines_and_one_object_packed_or_not(tmp_path: Path) -> None:
    objects = [{"text": "one"}, {"text": ' "two" '}, {"text": ""}]
    mark = b"\xef\xbb\xbf"
    lines = b"\n".join(json.dumps(o).encode() for o in objects)
    (tmp_path / "a.json").write_bytes(mark + json.dumps(objects).encode() + b"\n")
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps(objects, indent=2).encode()))
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(b"\n\n" + lines))
    (tmp_path / "d.json.zst").write_bytes(zstandard.compress(lines + b"\n"))
    (tmp_path / "e.json").write_bytes(mark + json.dumps(objects[0], indent=2).encode())
    (tmp_path / "f.JSON").write_bytes(json.dumps(objects[1]).encode())
    (tmp_path / "g.json").write_bytes(b" [ ] ")
    (tmp_path / "h.json").write_bytes(b"")
    reader = DocumentReader([tmp_path])
    assert [document.text for document in reader] == ["one", ' "two" '] * 4 + ["one", ' "two" ']
    assert reader.left_out.empty == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"}, {"text": 1}]', r"t\.json, value 1 has a number in the field"),
        ('[{"text": "a"}, ["b"]]', r"t\.json, value 1 holds a list; a JSON object is needed"),
        ('[{"text": "a"}, ]', r"t\.json, value 1 is not JSON \(Expecting value at character"),
        ('[{"text": "a"} {"text": "b"}]', r"t\.json, value 0 holds more than one JSON value"),
        ('[{"text": "a"}, {"text": "b"', r"t\.json is damaged or cut short \(its list does not end\): copy or make it"),
        ('[{"text": "a"}]\n[{"text": "b"}]', r"t\.json has text after the end of its list: give each object a line"),
        ('{"text": "a"}\n{"text": }', r"t\.json:2 is not JSON"),
        ('{\n"text": "a"\n}\n{"text": "b"}', r"t\.json holds more than one JSON value"),
        (
            '{"version": 1,\n "data": [{"text": "a"}]}',
            r't\.json has no field "text" but version \(a number\), data \(a l',
        ),
    ],
)
def test_what_is_wrong_is_told_with_its_place(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        texts(tmp_path / "t.json")
    assert "\n" not in str(error.value)


def test_values_that_cannot_be_read_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_values, "READ_BYTES", 16)
    long = json.dumps({"text": 'c"\\' * 40})
    (tmp_path / "t.json").write_text(
        f'[{{"text": "a"}}, {{"text": nope}}, {long}, {{"text": "\udcff"}}, {{"text": "d"}}]', errors="surrogateescape"
    )
    reader = DocumentReader([tmp_path], on_error="skip", max_bytes=60)
    assert [document.text for document in reader] == ["a", "d"]
    words = (
        "value 1 is not JSON",
        "value 2 is longer than the 60 bytes",
        "value 3 is not UTF-8 text (the byte 0xff at offset",
    )
    assert all(word in message for word, message in zip(words, reader.left_out.first, strict=True))


def test_a_list_keeps_little_in_memory(tmp_path: Path) -> None:
    content = b"[" + b'{"text": "a"},' * (1 << 23) + b'{"text": "z"}]'
    (tmp_path / "t.json.zst").write_bytes(zstandard.compress(content))
    size = len(content)
    del content
    tracemalloc.start()
    for _ in zip(DocumentReader([tmp_path]), range(1000), strict=False):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size / 2
