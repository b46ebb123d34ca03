"""Read prompts and conversations, with the rules of training text."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from bd3_scale.data.fields import check_unicode, field_value, kind_of, string_field
from bd3_scale.data.files import find_files, format_of, named
from bd3_scale.data.remote_files import SourceFile
from bd3_scale.data.sources import json_lines, lines, unpacked
from bd3_scale.resilience.readers import reader

logger = logging.getLogger(__name__)


@reader("prompts")
def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file: the string `prompt` of each line of a `.jsonl`, or the lines of a `.txt`.

    Blank lines of a `.txt` are left out, which is logged; an empty `prompt` of a `.jsonl` is a prompt.

    Raises FileNotFoundError for a missing path; ValueError for a file of another kind, a line without a prompt, text
    that `DocumentReader` refuses, and a file without prompts.
    """
    prompts: list[str] = []
    for file in find_files([path], (".txt", ".jsonl")):
        prompts += _prompts_of_jsonl(file) if format_of(file) == ".jsonl" else _prompts_of_txt(file)
    if not prompts:
        raise ValueError(f"{path} has no prompts: give one on each line")
    return prompts


@reader("conversations")
def read_messages(path: Path) -> list[list[dict[str, Any]]]:
    """Return the conversations of a `.jsonl` file: the `messages` of each line, see `check_messages`.

    Raises FileNotFoundError for a missing path; ValueError for a file of another kind, a line without a conversation,
    text that `DocumentReader` refuses, and a file without conversations.
    """
    conversations = []
    for file in find_files([path], (".jsonl",)):
        with file.open("rb") as raw, unpacked(file, raw) as source:
            conversations += [messages_of(line.record(), line.where) for line in json_lines(source)]
    if not conversations:
        raise ValueError(f'{path} has no conversations: give a JSON object with a list "messages" on each line')
    return conversations


def messages_of(record: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Return the conversation in the field `messages` of a line's JSON object; see `check_messages`."""
    return check_messages(field_value(record, "messages", where, 'a conversation is a list "messages"'), where)


def check_messages(value: Any, where: str) -> list[dict[str, Any]]:
    """Return `value` if it is a list of at least one message: objects with strings `role` and `content`.

    Messages keep their other keys. Raises ValueError, which names the message, counted from 0, for anything else.
    """
    if not isinstance(value, list):
        raise ValueError(f'{where} has {kind_of(value)} in "messages"; a list of messages is needed')
    if not value:
        raise ValueError(f'{where} has an empty list in "messages": give one message or more')
    for index, message in enumerate(value):
        place = f"{where}, messages[{index}]"
        if not isinstance(message, dict):
            raise ValueError(f'{place} is {kind_of(message)}, not an object with strings "role" and "content"')
        for field in ("role", "content"):
            text = string_field(message, field, place, 'a message has strings "role" and "content"')
            check_unicode(text, f'{place}, "{field}"')
    return value


def _prompts_of_jsonl(file: SourceFile) -> list[str]:
    prompts = []
    with file.open("rb") as raw, unpacked(file, raw) as source:
        for line in json_lines(source):
            prompts.append(string_field(line.record(), "prompt", line.where, 'a prompt is a string "prompt"'))
            check_unicode(prompts[-1], line.where)
    return prompts


def _prompts_of_txt(file: SourceFile) -> list[str]:
    with file.open("rb") as raw, unpacked(file, raw) as source:
        texts = [line.text() for line in lines(source)]
    blank = [number for number, text in enumerate(texts, 1) if not text.strip()]
    if blank:
        logger.warning("%s: %d blank lines left out (line %s)", file, len(blank), named(blank))
    return [text for text in texts if text.strip()]
