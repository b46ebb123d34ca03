"""Check that the notebook of `examples/` runs from a fresh kernel and shows the stored outputs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import TESTS

EXAMPLES = TESTS.parent / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def outputs(notebook: Any) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Return what each code cell printed and showed; of a picture, only its type."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            printed = "".join(output.text for output in cell.outputs if output.output_type == "stream")
            shown = [
                (kind, "" if kind.startswith("image/") else str(value))
                for output in cell.outputs
                if output.output_type != "stream"
                for kind, value in sorted(output.data.items())
            ]
            yield printed, shown


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_shows_what_stands_in_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS.parent))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.delenv("BD3_SCALE_MODEL", raising=False)
    committed = nbformat.read(path, as_version=4)
    executed = nbformat.read(path, as_version=4)
    for cell in executed.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    client = NotebookClient(executed, timeout=200, resources={"metadata": {"path": str(EXAMPLES)}})
    # Use this interpreter, whatever kernels the user has installed.
    client.create_kernel_manager()
    client.km.kernel_spec.argv[0] = sys.executable
    client.execute()
    found = list(outputs(executed))
    assert any(shown for _, shown in found)
    assert found == list(outputs(committed))
