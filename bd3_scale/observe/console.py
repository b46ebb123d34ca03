"""How the project prints: the one place where text of others, such as names, becomes something that rich shows.

Names, titles, cells and labels are plain strings, never markup, and control characters in them are shown as escapes.
Everything else of rich (tables, trees, bars) is used as it is, on a `Console` of this module.
"""

from __future__ import annotations

import sys
from typing import Any

import rich.console
from rich.progress import TextColumn
from rich.text import Text

from bd3_scale.resilience.output import writing_results
from bd3_scale.resilience.terminal import clean


class Console(rich.console.Console):
    """A console on which every string stands for itself, also in tables, trees and their titles.

    OSError: stdout cannot be written.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(clean(text), **options)

    def print(self, *objects: Any, **options: Any) -> None:
        if self.stderr:
            super().print(*objects, **options)
            return
        with writing_results():
            super().print(*objects, **options)


def label(text_format: str) -> TextColumn:
    """Return a column of a bar with text, in which fields of the task may stand in braces."""
    return TextColumn(clean(text_format), markup=False)


def styled(*parts: str | tuple[str, str]) -> Text:
    """Return strings, or strings with a style, as one text."""
    return Text.assemble(*(clean(part) if isinstance(part, str) else (clean(part[0]), part[1]) for part in parts))


def say(text: str) -> None:
    """Print a line to stdout, cleaned. OSError: stdout cannot be written."""
    with writing_results():
        print(clean(text), flush=True)


def put(text: str, end: str = "\n") -> None:
    """Print what a program may read, such as JSON or a text that was generated: cleaned for a terminal alone.

    OSError: stdout cannot be written.
    """
    with writing_results():
        print(clean(text) if sys.stdout.isatty() else text, end=end, flush=True)
