"""Every `bd3-scale` command of the README and of docs/ is one that this version takes, with its options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bd3_scale.cli import app

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def commands(page: str) -> list[str]:
    """Lines of blocks of code that begin with the command, those that a backslash goes on joined."""
    found = []
    for block in re.findall(r"^```\w*\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines():
            if match := re.match(r"(?:\$ )?(?:.*--no-python )?(?:\.venv/bin/)?bd3-scale (.*)", line):
                found.append(match[1])
    return found


def wrong(line: str) -> str:
    """What the command line says of the options of a command, which it does not run."""
    told = CliRunner().invoke(app, [*shlex.split(line, comments=True), "--help"])
    return told.output if told.exit_code else ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_taken(page: Path) -> None:
    assert [line + told for line in commands(page.read_text()) if (told := wrong(line))] == []


def test_a_wrong_option_is_found() -> None:
    assert len(commands((REPOSITORY / "README.md").read_text())) > 20
    assert commands("```\n$ bd3-scale doctor \\\n    --clutser x\n```\n") == ["doctor --clutser x"]
    assert "No such option: --clutser" in wrong("doctor --clutser x")
    assert "No such command 'perpare'" in wrong("data perpare corpus/")
    assert not wrong("doctor --cluster x   # a comment's")
