"""Check that recipes of the package are found by their names, from any folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from bd3_scale.recipe.library import find_recipe, library
from bd3_scale.recipe.section import RecipeError


def test_a_name_stands_for_a_recipe_of_the_package_where_there_is_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("quickstart") == library()["quickstart"]
    Path("quickstart").mkdir()  # a project's folder
    assert find_recipe("quickstart") == library()["quickstart"]
    Path("8b").write_text("name: mine\n")
    assert find_recipe("8b") == Path("8b")
    Path("mine").mkdir()
    assert find_recipe("mine") == Path("mine")  # its reader says that it is a folder


def test_a_name_that_is_none_names_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="did you mean quickstart"):
        find_recipe("quikstart")
