from __future__ import annotations

from pathlib import Path

import pytest

from bd3_scale.resilience.files import new_folder


def test_appears_complete(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with new_folder(out) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
        assert not out.exists()
    assert (out / "sub" / "file").read_text() == "x"
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_leaves_nothing_where_the_block_raises(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("x")
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_somebody_else_made_in_the_meantime_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def both_make_it() -> None:
        with new_folder(out):
            out.mkdir()
            (out / "theirs").touch()

    with pytest.raises(FileExistsError, match="by another process meanwhile"):
        both_make_it()
    assert list(tmp_path.rglob("*")) == [out, out / "theirs"]


def test_an_existing_folder_is_kept(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="remove it or choose"), new_folder(tmp_path):
        pass
    assert tmp_path.exists()
