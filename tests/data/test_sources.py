from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pytest
import zstandard

from bd3_scale.data.sources import DocumentReader


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
        (b'{"body": "x"}', r't\.jsonl:2 has no document.*"text"'),
        (b'{"text": 3}', r"t\.jsonl:2 has no document"),
        (b'["text"]', r"t\.jsonl:2 has no document"),
        (b'{"text": "\xff"}', r"t\.jsonl:2 is not UTF-8"),
        (b'{"text": "\\ud800"}', r"t\.jsonl:2 holds text that is not Unicode"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "t.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=message):
        texts(tmp_path)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"t\.txt is not UTF-8"):
        texts(tmp_path)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing does not exist"):
        DocumentReader([tmp_path / "missing"])
    with pytest.raises(ValueError, match="nothing to read"):
        DocumentReader([tmp_path])
    (tmp_path / "t.pdf").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"t\.pdf is not a kind of file"):
        DocumentReader([tmp_path / "t.pdf"])
