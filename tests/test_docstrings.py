"""Check that docstrings begin with a verb: "Return the hash of each text.", not "Of each text."."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
ROOTS = ("bd3_scale", "reproduction", "tools")
# Imperative forms. Add a verb that is missing here, but no noun or adjective.
VERBS = frozenset((Path(__file__).parent / "support/verbs.txt").read_text().split())


def without_verb(source: str) -> Iterator[str]:
    """Yield line, name and first line of each docstring of a module or function that begins with no known verb."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef) and (doc := ast.get_docstring(node)):
            first = doc.splitlines()[0]
            word = re.match(r"[A-Z][a-z]*", first)
            if word is None or word[0].lower() not in VERBS:
                yield f"{getattr(node, 'lineno', 1)} {getattr(node, 'name', 'module')}: {first}"


@pytest.mark.parametrize("root", ROOTS)
def test_the_first_line_says_what_is_done(root: str) -> None:
    paths = sorted((REPOSITORY / root).rglob("*.py"))
    assert len(paths) > 2
    assert [f"{path.relative_to(REPOSITORY)}:{line}" for path in paths for line in without_verb(path.read_text())] == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('"""Metrics of a run."""', ["1 module: Metrics of a run."]),
        ('def f():\n    """Of each text."""', ["1 f: Of each text."]),
        ('class A:\n    """A noun phrase."""\n    async def f(self):\n        """The hash."""', ["3 f: The hash."]),
        ('"""Write metrics."""\ndef f():\n    """Return the hash of each text."""\ndef g(): ...', []),
    ],
)
def test_a_first_line_without_a_verb_is_found(source: str, expected: list[str]) -> None:
    assert list(without_verb(source)) == expected
