from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from bd3_scale.train.main import own_temporary_files


def test_temporary_files_of_a_rank_and_its_children_go_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    child = "import os, tempfile; os.close(tempfile.mkstemp()[0])"
    with own_temporary_files():
        (folder,) = tmp_path.glob("bd3_scale-rank-????????")
        assert Path(tempfile.mkdtemp()).parent == folder
        subprocess.run([sys.executable, "-c", child], check=True, timeout=60)
        assert len(list(folder.iterdir())) == 2
    assert list(tmp_path.iterdir()) == []
    assert os.environ["TMPDIR"] == tempfile.gettempdir() == str(tmp_path)


def test_a_temporary_folder_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match="gone"), own_temporary_files():
        pass
