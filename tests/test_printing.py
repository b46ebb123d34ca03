"""Check, in the package's source, that text of others is printed only through the one module that cleans it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "bd3_scale"
# These modules clean what they print.
PLACES = {"observe/console.py", "resilience/terminal.py"}
# It prints to its own log, and cleans the text there.
CLEANING = {"launch/records.py"}
# Parts of rich that make text of markup, or write it to a console of rich's own.
FORBIDDEN_IMPORTS = {
    f"rich.{name}"
    for name in ("print", "get_console", "inspect", "console.Console", "text.Text", "markup", "progress.TextColumn")
}
FORBIDDEN_CALLS = {
    "print",
    *(f"{module}.{name}" for module in ("typer", "click") for name in ("echo", "secho", "prompt", "confirm")),
    *(f"sys.{stream}.write" for stream in ("stdout", "stderr")),
    *(f"traceback.{name}" for name in ("print_exc", "print_exception", "print_stack")),
}
# Without an argument, these draw on a console of rich's own.
NEED_A_CONSOLE = {"Live", "Progress", "Status"}


def violations(package: Path) -> list[str]:
    return [
        f"{path.relative_to(package).as_posix()}:{line} {what}"
        for path in sorted(package.rglob("*.py"))
        if path.relative_to(package).as_posix() not in PLACES
        for line, what in broken_rules(ast.parse(path.read_text()), path.relative_to(package).as_posix())
    ]


def broken_rules(tree: ast.AST, file: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, f"imports {alias.name}") for alias in node.names if is_rich(alias.name))
        elif isinstance(node, ast.ImportFrom) and node.module and is_rich(node.module):
            names = {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
            yield from ((node.lineno, f"imports {name}") for name in sorted(names & FORBIDDEN_IMPORTS))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS and file not in CLEANING:
                yield node.lineno, f"calls {name}"
            if name in NEED_A_CONSOLE and "console" not in {keyword.arg for keyword in node.keywords}:
                yield node.lineno, f"makes a {name} without console=…"


def is_rich(module: str) -> bool:
    return module.partition(".")[0] == "rich"


def test_all_that_is_printed_passes_through_one_place() -> None:
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("print(name)", "calls print"),
        ("import typer\ndef f():\n    typer.echo(name)", "calls typer.echo"),
        ("import sys\nsys.stderr.write(name)", "calls sys.stderr.write"),
        ("import traceback\ntraceback.print_exc()", "calls traceback.print_exc"),
        ("from rich.console import Console\nConsole()", "imports rich.console.Console"),
        ("from rich.text import Text", "imports rich.text.Text"),
        ("from rich import print", "imports rich.print"),
        ("import rich", "imports rich"),
        ("from rich.progress import Progress, TextColumn", "imports rich.progress.TextColumn"),
        ("from rich.live import Live\nLive(transient=True)", "makes a Live without console"),
    ],
)
def test_another_way_is_found(tmp_path: Path, source: str, words: str) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train/new.py").write_text(source)
    (violation,) = violations(tmp_path)
    assert violation.startswith("train/new.py:")
    assert words in violation
