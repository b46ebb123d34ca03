"""Every `bd3-scale` command of the README and of docs/ is one that this version takes, with its options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import typer

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


def parse(command: click.Command, words: list[str]) -> None:
    """Let the command line read its words, as far as that does nothing."""
    context = command.make_context(command.name, words)
    if isinstance(command, click.Group):
        _, inner, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        parse(inner, rest)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_taken(page: Path) -> None:
    for line in commands(page.read_text()):
        words = shlex.split(line.partition(" ; ")[0], comments=True)
        try:
            parse(typer.main.get_command(app), words)
        except click.UsageError as error:
            pytest.fail(f"{page.name}: bd3-scale {line}: {error.format_message()}")


def test_a_wrong_option_is_found() -> None:
    assert len(commands((REPOSITORY / "README.md").read_text())) > 20
    assert commands("```\n$ bd3-scale doctor \\\n    --clutser x\n```\n") == ["doctor --clutser x"]
    with pytest.raises(click.UsageError, match="clutser"):
        parse(typer.main.get_command(app), ["doctor", "--clutser", "x"])
    with pytest.raises(click.UsageError, match="missing"):
        parse(typer.main.get_command(app), ["data", "prepare", "corpus/", "--out", "data", "--missing"])
