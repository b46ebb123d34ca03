from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from bd3_scale.data import sources as module
from bd3_scale.data.sources import DocumentReader, OpenFile, Record, whole
from bd3_scale.registry import source_formats


def texts(*sources: Path) -> list[str]:
    return [document.text for document in DocumentReader(sources)]


def test_every_kind_of_file_in_a_folder_in_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    line = json.dumps({"text": "two é", "title": "ignored"}).encode()
    lines = line + b"\n\n" + json.dumps({"text": "  \n"}).encode() + b"\n" + json.dumps({"text": "three"}).encode()
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_bytes(b"one\r\nline")
    (tmp_path / "b.jsonl").write_bytes(lines)
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"four"))
    (tmp_path / "d.jsonl.zst").write_bytes(zstandard.compress(lines[:20]) + zstandard.compress(lines[20:]))
    (tmp_path / "sub" / "e.txt.zst").write_bytes(zstandard.compress(b""))
    (tmp_path / "sub" / "f.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "sub" / "g.py").write_bytes(b"not read")
    with caplog.at_level(logging.WARNING):
        reader = DocumentReader([tmp_path])
    documents = list(reader)
    expected = ["one\r\nline", "two é", "three", "four", "two é", "three", "two é", "three"]
    assert [document.text for document in documents] == expected
    assert reader.num_empty == 4
    assert [document.position for document in documents] == sorted(document.position for document in documents)
    assert documents[-1].position == reader.num_bytes
    assert "1 files of other kinds ignored (sub/g.py)" in caplog.text


def test_a_large_zst_file_comes_back_whole(tmp_path: Path) -> None:
    text = "".join(f"{i}\n" for i in range(300_000))
    (tmp_path / "large.txt.zst").write_bytes(zstandard.compress(text.encode()))
    assert texts(tmp_path / "large.txt.zst") == [text]


@pytest.mark.parametrize("name", ["t.txt.gz", "t.txt.zst", "t.jsonl.gz", "t.jsonl.zst"])
@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_damaged_archives(tmp_path: Path, name: str, damage: str) -> None:
    content = b"".join(json.dumps({"text": str(i)}).encode() + b"\n" for i in range(20_000))
    packed = gzip.compress(content) if name.endswith("gz") else zstandard.compress(content)
    file = tmp_path / name
    file.write_bytes(packed[:-3] if damage == "cut" else b"garbage" + packed)
    with pytest.raises(ValueError, match=f"{name} is damaged or cut short"):
        texts(file)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": ', r"t\.jsonl:2 is not JSON"),
        (
            b'{"content": "x", "id": 3}',
            r't\.jsonl:2 has no field "text" but content \(a string\), id \(a number\): name',
        ),
        (b"{}", r't\.jsonl:2 has no field "text" and no other: name the field with --field$'),
        (
            b'{"text": 3}',
            r't\.jsonl:2 has a number in the field "text", not a string; the fields are text \(a number\): name',
        ),
        (b'{"text": null, "b": 0.5}', r"2 has null in .* text \(null\), b \(a number\): name the field with --field$"),
        (b'{"text": ["x"], "b": {}}', r"2 has a list in .* text \(a list\), b \(an object\): name"),
        (b'{"text": true, "b": false}', r"2 has true in .* text \(true\), b \(false\): name"),
        (b'{"a": 1, "b": 1, "c": 1, "d": 1, "e": 1, "f": 1, "g": 1, "h\\n": 1, "i": 1}', r"'h\\n' \(a number\), …: "),
        (b'["text"]', r"t\.jsonl:2 holds a list; a JSON object is needed$"),
        (b'{"text": "\xff"}', r"t\.jsonl:2 is not UTF-8 text \(the byte 0xff at offset 30 of"),
        (b'{"text": "\\ud800"}', r"t\.jsonl:2 holds text that is not Unicode \(\\ud800 at character 1 is half"),
        (b'{"text": "x", "y": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", r"t\.jsonl:2 is nested too deep"),
        (b'{"text": "x"} {"text": "y"}', r"""t\.jsonl:2 holds more than one JSON value \('{"text": "y"}' follows"""),
        (b'{"text": "x"}]', r"t\.jsonl:2 holds more than one JSON value \('\]' follows"),
        (b'\xef\xbb\xbf{"text": "x"}', r"t\.jsonl:2 is not JSON \(Expecting value at character 1\)"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "t.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=message) as error:
        texts(tmp_path)
    assert "\n" not in str(error.value)


@source_formats.register(".test-csv")
def rows_of_csv(source: OpenFile) -> Iterator[Record]:
    """Yield one document for each row of CSV, a format that the package does not have."""
    text = io.TextIOWrapper(source.stream, encoding="utf-8", newline="")
    for number, row in enumerate(csv.DictReader(text), 1):
        yield Record(f"{source.file}, row {number}", row)


source_formats.register(".test-md")(whole)


def test_a_format_from_outside_is_read_packed_or_not_beside_the_others(tmp_path: Path) -> None:
    content = b'id,text\r\n1,"one, or\ntwo"\r\n2,\r\n3,three\r\n'
    (tmp_path / "a.test-csv").write_bytes(content)
    (tmp_path / "b.TEST-CSV.zst").write_bytes(zstandard.compress(content))
    (tmp_path / "c.test-csv.gz").write_bytes(gzip.compress(content))
    (tmp_path / "d.txt").write_bytes(b"four")
    (tmp_path / "e.test-md").write_bytes(b"# five")
    reader = DocumentReader([tmp_path])
    documents = list(reader)
    assert [document.text for document in documents] == ["one, or\ntwo", "three"] * 3 + ["four", "# five"]
    assert (reader.num_documents, reader.num_empty, documents[-1].position) == (8, 3, reader.num_bytes)
    assert [document.text for document in DocumentReader([tmp_path / "a.test-csv"], field="id")] == ["1", "2", "3"]
    with pytest.raises(ValueError, match=r'a\.test-csv, row 1 has no field "body" but id \(a string\), text'):
        list(DocumentReader([tmp_path], field="body"))
    with pytest.raises(ValueError, match=r"give files that end in \.jsonl, \.jsonl\.gz, \.jsonl\.zst, \.json"):
        DocumentReader([tmp_path / "a.test-csv"], text_of=lambda record, where: "")


def test_what_a_format_from_outside_cannot_read_is_skipped_or_named(tmp_path: Path) -> None:
    (tmp_path / "a.test-csv").write_bytes(b"text\nfine\n" + b"x" * 100_000 + b"\n\xff\n")
    (tmp_path / "b.test-csv.gz").write_bytes(gzip.compress(b"text\nwell\n")[:-3])
    (tmp_path / "c.test-md").write_bytes(b"12345678")
    (tmp_path / "d.txt").write_bytes(b"last")
    reader = DocumentReader([tmp_path], on_error="skip", max_bytes=7)
    assert [document.text for document in reader][-1] == "last"
    assert reader.num_skipped == 3
    expected = ("a.test-csv is not UTF-8 text", "b.test-csv.gz is damaged or cut", "c.test-md is longer than the 7")
    assert all(words in message for words, message in zip(expected, reader.skipped, strict=True))
    with pytest.raises(ValueError, match=r"a\.test-csv is not UTF-8 text \(.*0xff"):
        texts(tmp_path)


def test_a_number_of_many_digits_is_read(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(b'{"text": "fine", "id": ' + b"3" * 5_000 + b"}\n")
    assert texts(tmp_path) == ["fine"]


def test_a_byte_order_mark_begins_a_file_and_is_text_elsewhere(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(mark + "one\n\ufefftwo".encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(mark + mark + b"one"))
    (tmp_path / "c.jsonl").write_bytes(mark + json.dumps({"text": "\ufeffone"}, ensure_ascii=False).encode())
    (tmp_path / "d.jsonl.zst").write_bytes(zstandard.compress(mark + b'\n{"text": "two"}\n'))
    assert texts(tmp_path) == ["one\n\ufefftwo", "\ufeffone", "\ufeffone", "two"]


def test_the_kind_of_a_file_is_its_last_suffix_whatever_the_case(tmp_path: Path) -> None:
    (tmp_path / "a.JSONL").write_bytes(b'{"text": "one"}\n')
    (tmp_path / "b.jsonl.txt").write_bytes(b"two")
    (tmp_path / "c.Txt.GZ").write_bytes(gzip.compress(b"three"))
    (tmp_path / "d.Jsonl.ZST").write_bytes(zstandard.compress(b'{"text": "four"}\n'))
    assert texts(tmp_path) == ["one", "two", "three", "four"]


ODD_TEXT = st.text(st.one_of(st.sampled_from("\u2028\u2029\x0b\x0c\x1c\x85\ufeff\r\n"), st.characters(codec="utf-8")))


@given(st.lists(ODD_TEXT), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_documents_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, documents: list[str], end: str, mark: bool
) -> None:
    lines = (json.dumps({"text": text}, ensure_ascii=False) + end for text in documents)
    file = tmp_path_factory.mktemp("documents") / "t.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" * mark + "".join(lines).encode())
    assert texts(file) == [text for text in documents if text.strip()]


@pytest.mark.parametrize(
    ("field", "record"),
    [
        ("body", {"text": 3, "body": "fine"}),
        ("document.body", {"document": {"body": "fine"}}),
        ("document.body", {"document": {"body": "no"}, "document.body": "fine"}),
        ("a.b.c", {"a": {"b": {"c": "fine"}}}),
    ],
)
def test_the_text_in_another_field(tmp_path: Path, field: str, record: dict[str, Any]) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps(record))
    assert [document.text for document in DocumentReader([tmp_path], field=field)] == ["fine"]


@pytest.mark.parametrize(
    ("field", "record", "message"),
    [
        ("a.b", {"a": {"c": "x"}, "d": 1}, r'has no field "a\.b" but a\.c \(a string\): name'),
        ("a", {"a": {"c": "x"}}, r'has an object in the field "a", not a string; the fields are a\.c \(a string\)'),
        ("a.b", {"a": {"b": None}}, r'has null in the field "a\.b", not a string; the fields are a\.b \(null\)'),
        ("a.b", {"a": "b"}, r'has no field "a\.b" but a \(a string\)'),
        ("a.b", {"a.b": 1, "a": {"b": "x"}}, r'has a number in the field "a\.b"'),
    ],
)
def test_the_fields_beside_a_missing_one_are_named(
    tmp_path: Path, field: str, record: dict[str, Any], message: str
) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        list(DocumentReader([tmp_path], field=field))


def test_documents_of_whole_records(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def joined(record: dict[str, Any], where: str) -> str:
        if "parts" not in record:
            raise ValueError(f"{where} has no parts")
        return " ".join(record["parts"])

    (tmp_path / "t.jsonl").write_bytes(b'{"parts": ["a", "b"]}\n\n{}\n{"parts": ["\\ud800"]}\n')
    (tmp_path / "t.txt").write_text("no object")
    reader = DocumentReader([tmp_path], on_error="skip", text_of=joined)
    assert [document.text for document in reader] == ["a b"]
    assert reader.skipped[0] == f"{tmp_path / 't.jsonl'}:3 has no parts"
    assert "t.jsonl:4 holds text that is not Unicode" in reader.skipped[1]
    assert "1 files of other kinds ignored (t.txt)" in caplog.text
    with pytest.raises(ValueError, match=r"t\.jsonl:3 has no parts"):
        list(DocumentReader([tmp_path], text_of=joined))
    with pytest.raises(ValueError, match=r"t\.txt is not a kind of file that can be read here; give .*\.jsonl"):
        DocumentReader([tmp_path / "t.txt"], text_of=joined)


def test_what_cannot_be_read_is_skipped_and_counted(tmp_path: Path) -> None:
    good = b"".join(json.dumps({"text": str(i)}).encode() + b"\n" for i in range(20_000))
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n' + b"null\n" * 6 + b'{"text": " "}\n{"text": "two"}\n')
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(good)[:-30])
    (tmp_path / "d.txt.zst").write_bytes(zstandard.compress(b"four")[:-3])
    (tmp_path / "e.txt").write_bytes(b"five")
    reader = DocumentReader([tmp_path], on_error="skip")
    for _ in range(2):
        documents = [document.text for document in reader]
        assert documents[:2] == ["one", "two"]
        assert documents[-1] == "five"
        numbers = documents[2:-1]
        assert numbers == [str(i) for i in range(len(numbers))]
        assert 10_000 < len(numbers) < 20_000
        assert (reader.num_documents, reader.num_empty, reader.num_skipped) == (len(documents), 1, 9)
        place = f"{tmp_path / 'a.jsonl'}:%d holds null; a JSON object is needed"
        assert list(reader.skipped) == [place % number for number in range(2, 7)]
    reader = DocumentReader([tmp_path / name for name in ("b.txt", "c.jsonl.gz", "d.txt.zst")], on_error="skip")
    assert list(reader)
    kinds = ("b.txt is not UTF-8", "c.jsonl.gz is damaged", "d.txt.zst is damaged")
    assert all(kind in message for kind, message in zip(kinds, reader.skipped, strict=True))


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_document_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: bytes) -> None:
    monkeypatch.setattr(module, "READ_BYTES", 64)
    longest, short = b'{"text": "' + b"a" * 88 + b'"}', b'{"text": "short"}'
    (tmp_path / "a.jsonl").write_bytes(mark + longest + b"\n" + longest.replace(b"a", b"aa") + b"\r\n" + short)
    (tmp_path / "b.jsonl").write_bytes(mark + longest.replace(b"aa", b"aaa", 1) + b"\n" + short + b"\n")
    (tmp_path / "c.txt").write_bytes(mark + b"b" * 100)
    (tmp_path / "d.txt").write_bytes(mark + b"c" * 101)
    reader = DocumentReader([tmp_path], on_error="skip", max_bytes=100)
    assert [document.text for document in reader] == ["a" * 88, "short", "short", "b" * 100]
    assert [message.split(" is longer than the 100 bytes")[0] for message in reader.skipped] == [
        f"{tmp_path}/{place}" for place in ("a.jsonl:2", "b.jsonl:1", "d.txt")
    ]


def test_unpacking_keeps_little_in_memory(tmp_path: Path) -> None:
    lines = b'{"text": "a"}\n' * (1 << 23)
    (tmp_path / "t.jsonl.zst").write_bytes(zstandard.compress(lines))
    size = len(lines)
    del lines
    tracemalloc.start()
    for _ in zip(DocumentReader([tmp_path]), range(1000), strict=False):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size / 2


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfone " + "é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"t\.txt is not UTF-8 text \(the byte 0xe9 at offset 7 of"):
        texts(tmp_path)
