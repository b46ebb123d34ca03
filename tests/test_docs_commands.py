"""Check that this version accepts every `bd3-scale` command of the README and of docs/, with its options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from bd3_scale.cli import app

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def commands(page: str) -> list[str]:
    """Return the lines of code blocks that begin with the command; lines that end in a backslash are joined."""
    found = []
    for block in re.findall(r"^```\w*\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines():
            if match := re.match(r"(?:\$ )?(?:.*--no-python )?(?:\.venv/bin/)?bd3-scale (.*)", line):
                found.append(match[1])
    return found


def with_help(words: list[str]) -> list[str]:
    """Return the words with `--help` after the command's name; at the end, it could be taken for an option's value."""
    command: Any = typer.main.get_command(app)
    place = 0
    while (commands := getattr(command, "commands", None)) and place < len(words):  # a group
        if words[place] == "--plugin":
            place += 2
        elif words[place] in commands:
            command = commands[words[place]]
            place += 1
        else:
            return [*words, "--help"]  # there is no such command
    return [*words[:place], "--help", *words[place:]]


def wrong(line: str) -> str:
    """Return what the command line says of a command's options, without running the command."""
    told = CliRunner().invoke(app, with_help(shlex.split(line, comments=True)))
    return told.output if told.exit_code else ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_taken(page: Path) -> None:
    assert [line + told for line in commands(page.read_text()) if (told := wrong(line))] == []


def test_a_wrong_option_is_found() -> None:
    assert len(commands((REPOSITORY / "README.md").read_text())) > 15
    assert commands("```\n$ bd3-scale doctor \\\n    --clutser x\n```\n") == ["doctor --clutser x"]
    assert "No such option: --clutser" in wrong("doctor --clutser x")
    assert "No such command 'perpare'" in wrong("data perpare corpus/")
    assert not wrong("doctor --cluster x   # a comment's")
    assert "requires an argument" in wrong("data tokenizer corpus --out")
