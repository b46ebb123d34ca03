"""Test that prompts and conversations are read by the rules of training text."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from bd3_scale.data.prompts import check_messages, read_messages, read_prompts

HELLO = {"role": "user", "content": "Hello"}


def as_lines(*values: Any) -> bytes:
    return b"".join(json.dumps(value, ensure_ascii=False).encode() + b"\n" for value in values)


def test_a_txt_has_a_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeffone\x0c1\u20282\x853\r4\r\n \ufefftwo \nthree\r".encode())
    expected = ["one\x0c1\u20282\x853\r4", " \ufefftwo ", "three\r"]
    assert read_prompts(tmp_path / "p.txt") == expected
    (tmp_path / "p.TXT.gz").write_bytes(gzip.compress((tmp_path / "p.txt").read_bytes()))
    assert read_prompts(tmp_path / "p.TXT.gz") == expected


def test_blank_lines_are_no_prompts_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "p.txt").write_text("one\n\ntwo\n \t\n\n")
    with caplog.at_level(logging.WARNING):
        assert read_prompts(tmp_path / "p.txt") == ["one", "two"]
    assert caplog.messages == [f"{tmp_path / 'p.txt'}: 3 blank lines left out (line 2, 4, 5)"]


def test_a_jsonl_has_a_string_a_line_and_an_empty_one_is_a_prompt(tmp_path: Path) -> None:
    lines = as_lines({"prompt": "a\nb"}, {"prompt": ""}, {"prompt": "c\u2028d", "id": 3}).replace(b"\n", b"\r\n", 1)
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + lines + b"\n")
    (tmp_path / "p.JSONL.zst").write_bytes(zstandard.compress(lines))
    assert read_prompts(tmp_path / "p.jsonl") == read_prompts(tmp_path / "p.JSONL.zst") == ["a\nb", "", "c\u2028d"]


@given(st.lists(st.text(st.one_of(st.sampled_from("\u2028\x0c\x85\ufeff\r\n\x1c\x00"), st.characters(codec="utf-8")))))
def test_prompts_come_back_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    file = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    file.write_bytes(as_lines(*({"prompt": text} for text in ["first", *texts])))
    assert read_prompts(file) == ["first", *texts]
    one_line = [text.replace("\n", "") + "." for text in texts]
    file.with_suffix(".txt").write_bytes("".join(f"{text}\n" for text in ["first", *one_line]).encode())
    assert read_prompts(file.with_suffix(".txt")) == ["first", *one_line]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": null}', r'p\.jsonl:2 has null in the field "prompt", not a string'),
        (b'{"prompt": 7}', r'p\.jsonl:2 has a number in the field "prompt"'),
        (b'{"text": "b"}', r'p\.jsonl:2 has no field "prompt" but text \(a string\): a prompt is a string "prompt"'),
        (b'"b"', r"p\.jsonl:2 holds a string; a JSON object is needed"),
        (b"prompt", r"p\.jsonl:2 is not JSON"),
        (b'{"prompt": "\\udc00"}', r"p\.jsonl:2 holds text that is not Unicode"),
        (b'{"prompt": "\xff"}', r"p\.jsonl:2 is not UTF-8 text \(the byte 0xff at offset 28 of"),
    ],
)
def test_lines_without_a_prompt_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "a"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "p.jsonl")


def test_files_without_prompts(tmp_path: Path) -> None:
    for name, content in (("p.txt", b"\n \n"), ("p.jsonl", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} has no prompts"):
            read_prompts(tmp_path / name)
    with pytest.raises(ValueError, match=r"p\.jsonl has no conversations"):
        read_messages(tmp_path / "p.jsonl")
    (tmp_path / "p.md").write_text("one")
    with pytest.raises(ValueError, match=r"p\.md is not a kind of file"):
        read_prompts(tmp_path / "p.md")
    with pytest.raises(ValueError, match=r"p\.txt is not a kind of file .* end in \.jsonl, "):
        read_messages(tmp_path / "p.txt")


def test_conversations_keep_their_other_keys(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "", "thoughts": None}
    (tmp_path / "c.jsonl").write_bytes(as_lines({"messages": [HELLO]}, {"messages": [HELLO, answer], "id": 1}))
    assert read_messages(tmp_path / "c.jsonl") == [[HELLO], [HELLO, answer]]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"conversation": []}, r'c\.jsonl:2 has no field "messages" but conversation \(a list\)'),
        ({"messages": None}, r'c\.jsonl:2 has null in "messages"; a list'),
        ({"messages": HELLO}, r'c\.jsonl:2 has an object in "messages"'),
        ({"messages": []}, r"c\.jsonl:2 has an empty list"),
        ({"messages": [HELLO, "Hello"]}, r"c\.jsonl:2, messages\[1\] is a string, not an object"),
        (
            {"messages": [{"content": "Hello"}]},
            r'c\.jsonl:2, messages\[0\] has no field "role" but content \(a string\)',
        ),
        ({"messages": [HELLO, {"role": "user", "content": None}]}, r'messages\[1\] has null in the field "content"'),
        ({"messages": [{"role": 1, "content": ""}]}, r'messages\[0\] has a number in the field "role"'),
    ],
)
def test_what_is_no_conversation_is_named(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    (tmp_path / "c.jsonl").write_bytes(as_lines({"messages": [HELLO]}, record))
    with pytest.raises(ValueError, match=message):
        read_messages(tmp_path / "c.jsonl")


def test_a_message_is_unicode() -> None:
    with pytest.raises(ValueError, match=r'here, messages\[0\], "content" holds text that is not Unicode'):
        check_messages([{"role": "user", "content": "\ud800"}], "here")
