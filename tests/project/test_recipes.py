"""Check the package's recipes: found by name, listed, shown and copied."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bd3_scale.cli import app
from bd3_scale.project.markdown import reference_page
from bd3_scale.project.recipes import copy_recipe, recipe_text, summaries
from bd3_scale.recipe import library
from bd3_scale.recipe.load import load_recipe, recipe_files
from bd3_scale.recipe.schema import RecipeError
from tests.support.recipes import tiny_recipe

REPOSITORY = Path(__file__).parents[2]
NAMES = list(library.library())
TRAININGS = [name for name in NAMES if not name.startswith("adapt-")]


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["recipe", *map(str, arguments)], catch_exceptions=False, env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    return done.output


def test_every_recipe_of_the_repository_has_a_name() -> None:
    files = {path.relative_to(REPOSITORY / "recipes").with_suffix("") for path in REPOSITORY.glob("recipes/**/*.yaml")}
    assert set(NAMES) == {path.as_posix() for path in files}
    assert {"quickstart", "paper-small/quick"} <= set(NAMES)


def test_an_installed_package_has_them_as_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages/bd3_scale"
    shutil.copytree(REPOSITORY / "recipes", package / "recipes")
    monkeypatch.setattr(library, "_PACKAGE", package)
    assert library.named_recipe("books").is_relative_to(package)
    assert list(library.library()) == NAMES


def test_a_name_stands_for_a_file_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe("quickstart") == load_recipe(REPOSITORY / "recipes/quickstart.yaml")
    assert recipe_files("books-any") == [REPOSITORY / "recipes/books-any.yaml", REPOSITORY / "recipes/books.yaml"]
    Path("quickstart").write_text(json.dumps(tiny_recipe() | {"name": "mine"}))
    assert load_recipe("quickstart").name == "mine"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("quikstart", "did you mean quickstart?"),
        ("recipes/mine.yaml", "`bd3-scale recipe list` shows the names"),
        ("../recipes/quickstart", "no recipe of the package"),
    ],
)
def test_what_is_neither_file_nor_name_is_refused(tmp_path, monkeypatch, name: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as refused:
        load_recipe(name)
    assert f"{name}: cannot be read: No such file or directory" in str(refused.value)
    assert words in str(refused.value)


def test_the_list_says_what_size_and_ranks_each_has() -> None:
    found = {each.name: each for each in summaries()}
    assert list(found) == NAMES
    assert (found["1b"].parameters, found["1b"].nodes, found["1b"].ranks) == (1.05e9, 4, 8)
    assert (found["quickstart"].nodes, found["quickstart"].ranks) == (1, 2)
    assert found["books-any"].parameters == found["books"].parameters
    assert all((found[name].parameters is None) != (name in TRAININGS) for name in NAMES)
    assert all(10 < len(each.comment) < 150 for each in found.values())
    assert json.loads(run("list", "--json"))[0]["name"] == NAMES[0]
    assert "1.05 B" in run("list")


@pytest.mark.parametrize("name", TRAININGS)
def test_a_resolved_recipe_is_the_same_recipe(tmp_path: Path, name: str) -> None:
    (tmp_path / "resolved.yaml").write_text(recipe_text(name, resolved=True))
    assert load_recipe(tmp_path / "resolved.yaml") == load_recipe(name)


def test_an_adaptation_is_resolved_without_a_model() -> None:
    text = recipe_text("adapt-qwen3-moe", resolved=True)
    assert "aux_loss: 0.001" in text
    assert "num_layers" not in text
    assert "deterministic: true" in text
    assert "\nmodel:" not in recipe_text("adapt-small", resolved=True)


def test_a_recipe_is_shown_with_its_comments() -> None:
    assert run("show", "quickstart") == (REPOSITORY / "recipes/quickstart.yaml").read_text()


@pytest.mark.parametrize("name", TRAININGS)
def test_a_copy_is_the_same_recipe_wherever_it_lies(tmp_path: Path, name: str) -> None:
    files = copy_recipe(name, tmp_path / "new/mine.yaml")
    assert load_recipe(tmp_path / "new/mine.yaml") == load_recipe(name)
    assert len(files) == len(recipe_files(name))
    assert all(file.parent == tmp_path / "new" for file in recipe_files(tmp_path / "new/mine.yaml"))
    assert files[0].read_text().startswith("# ")


def test_a_copy_overwrites_nothing(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("mine")
    with pytest.raises(FileExistsError, match=r"mine\.yaml is there already"):
        copy_recipe("quickstart", mine)
    (tmp_path / "books.yaml").write_text("mine, too")
    with pytest.raises(FileExistsError, match=r"extends books\.yaml, and .* other content"):
        copy_recipe("books-any", tmp_path / "any.yaml")
    assert (mine.read_text(), (tmp_path / "books.yaml").read_text()) == ("mine", "mine, too")
    assert not (tmp_path / "any.yaml").exists()
    with pytest.raises(ValueError, match="take another name"):
        copy_recipe("books-any", tmp_path / "new/books.yaml")


def test_a_link_to_nowhere_is_there_already_and_what_is_extended_needs_another_folder(tmp_path: Path) -> None:
    (tmp_path / "link.yaml").symlink_to("nowhere")
    with pytest.raises(FileExistsError, match=r"link\.yaml is there already"):
        copy_recipe("quickstart", tmp_path / "link.yaml")
    (tmp_path / "small.yaml").write_text("name: other\n")
    with pytest.raises(FileExistsError, match=r"extends small\.yaml, .*choose another folder"):
        copy_recipe("paper-small/quick", tmp_path / "mine.yaml")


def test_two_copies_share_what_they_extend(tmp_path: Path) -> None:
    copy_recipe("books-any", tmp_path / "any.yaml")
    assert copy_recipe("books-ar", tmp_path / "ar.yaml") == [tmp_path / "ar.yaml"]


def test_the_page_of_the_recipe_is_what_the_schema_says() -> None:
    """Renew it: bd3-scale recipe explain --markdown > docs/recipe.md."""
    assert (REPOSITORY / "docs/recipe.md").read_text() == reference_page()
    assert run("explain", "--markdown") == reference_page()


def test_explanations_are_shown_and_given_as_json() -> None:
    shown = " ".join(run("explain", "diffusion.block_size").split())
    assert "unit tokens" in shown
    assert "default required" in shown
    assert "rule: Every block size divides data.seq_len." in shown
    (field,) = json.loads(run("explain", "train.steps", "--json"))
    assert field["unit"] == "steps"
    assert "optimizer.lr" in run("explain", "optimizer")
    assert "launch.deadlines.data" in run("explain")
