"""Check that every line of `docs/python.md` runs, and prints what the page shows."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from pathlib import Path

import pytest

from tests.conftest import TESTS

PAGE = TESTS.parent / "docs" / "python.md"
_BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n^```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)


def test_the_page_s_code_prints_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(TESTS / "fixtures" / "format-3", tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    page = PAGE.read_text()
    blocks = _BLOCK.findall(page)
    assert len(blocks) == page.count("```python") == page.count("```text")
    names: dict[str, object] = {}
    for code, said in blocks:
        line = page[: page.index(code)].count("\n")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * line + code, str(PAGE), "exec"), names)
        assert printed.getvalue() == said, f"{PAGE.name}, line {line + 1}"
