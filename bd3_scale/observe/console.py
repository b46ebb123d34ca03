"""Print with rich, safely: text of others, such as names, is never markup, and its control characters are escaped.

This holds for titles, cells and labels. Everything else of rich (tables, trees, bars) is used unchanged, on a `Console`
of this module.
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
    """A console that shows every string literally, also in tables, trees and their titles.

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
    """Return a column of a progress bar with text; `{task.fields[NAME]}` in it is replaced."""
    return TextColumn(clean(text_format), markup=False)


def styled(*parts: str | tuple[str, str]) -> Text:
    """Join strings, some of them with a style, to one text."""
    return Text.assemble(*(clean(part) if isinstance(part, str) else (clean(part[0]), part[1]) for part in parts))


def say(text: str) -> None:
    """Print a line to stdout, cleaned. OSError: stdout cannot be written."""
    with writing_results():
        print(clean(text), flush=True)


def put(text: str, end: str = "\n") -> None:
    """Print output that a program may read, such as JSON or generated text; it is cleaned only for a terminal.

    OSError: stdout cannot be written.
    """
    with writing_results():
        print(clean(text) if sys.stdout.isatty() else text, end=end, flush=True)
