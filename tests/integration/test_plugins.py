"""Check plug-ins that a recipe or a command line names: which commands import them, when, and which never do."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from tests.support import forks
from tests.support.programs import BD3_SCALE
from tests.support.recipes import write_recipe

# It records that it was imported, by which process, and which modules that process had before.
PLUGIN = """
import json, os, sys
from pathlib import Path
said = {"begun": Path("run/recipe.yaml").exists(), "argv": sys.argv}
if "RANK" in os.environ:
    recipe = Path(sys.argv[-1])
    said |= {"recipe": recipe.read_text(), "mode": oct(recipe.parent.stat().st_mode & 0o777)}
Path("seen", f"{__name__} {os.environ.get('RANK', 'launcher')}").write_text(json.dumps(said))
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, topics: Path) -> Path:
    """Make a folder with data, a recipe, and two plug-ins in `lab/`, of which the recipe names one."""
    folder = tmp_path_factory.mktemp("plug-ins")
    shutil.copytree(topics, folder / "data")
    base = write_recipe(folder / "base.yaml", train={"steps": 1}, plugins=["first.one"], launch={"processes": 2})
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"extends": base.name}))
    (folder / "lab/first").mkdir(parents=True)
    (folder / "lab/first/one.py").write_text(PLUGIN)
    (folder / "lab/second.py").write_text(PLUGIN)
    return folder


def run(folder: Path, *command: object, installed: bool = True, **environment: str) -> tuple[int, str]:
    """Return exit code and output of a command, with the plug-ins installed or without them."""
    shutil.rmtree(folder / "seen", ignore_errors=True)
    (folder / "seen").mkdir()
    path = [str(folder / "lab")] * installed + os.environ.get("PYTHONPATH", "").split(os.pathsep)
    done = forks.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": os.pathsep.join(path)} | environment)
    return done.returncode, done.stdout + done.stderr


def seen(folder: Path) -> dict[str, dict]:
    return {path.name: json.loads(path.read_text()) for path in (folder / "seen").iterdir()}


def test_every_rank_imports_them_before_it_begins_and_reads_the_one_recipe_that_was_checked(workplace: Path) -> None:
    code, output = run(workplace, BD3_SCALE, "--plugin", "second", "train", "recipe.yaml", "run_dir=run")
    assert code == 0, output
    found = seen(workplace)
    assert found.keys() == {f"{name} {who}" for name in ("first.one", "second") for who in ("launcher", "0", "1")}
    assert not any(process["begun"] for process in found.values())
    text = (workplace / "run/recipe.yaml").read_text()
    assert yaml.safe_load(text)["plugins"] == ["first.one", "second"]
    ranks = [process for who, process in found.items() if not who.endswith("launcher")]
    assert {(process["recipe"], process["mode"]) for process in ranks} == {(text, "0o700")}
    (handed,) = {process["argv"][-1] for process in ranks}
    assert not Path(handed).parent.exists()

    # Commands that read its checkpoints import nothing that they name.
    for reader in (["checkpoint", "verify", "run"], ["evaluate", "run", "--sequences", "2"]):
        code, output = run(workplace, BD3_SCALE, *reader)
        assert (code, seen(workplace)) == (0, {}), output


def test_the_environment_names_them_for_commands_without_a_recipe(workplace: Path) -> None:
    code, output = run(
        workplace, BD3_SCALE, "data", "tokenizer", "nothing", "--out", "x", BD3_SCALE_PLUGINS="second, first.one"
    )
    assert (code, seen(workplace).keys()) == (2, {"second launcher", "first.one launcher"}), output


@pytest.mark.parametrize(
    "command",
    [
        [BD3_SCALE, "train", "recipe.yaml", "run_dir=gone"],
        [BD3_SCALE, "submit", "recipe.yaml", "run_dir=gone", "--dry-run"],
        [BD3_SCALE, "--plugin", "first.one", "checkpoint", "list", "run"],
        [sys.executable, "-m", "bd3_scale.train", "recipe.yaml", "run_dir=gone"],
    ],
    ids=["launcher", "submission", "command line", "rank"],
)
def test_one_that_is_not_installed_is_named_before_any_work(workplace: Path, command: list[object]) -> None:
    code, output = run(workplace, *command, installed=False)
    assert (code, output.count("\n")) == (2, 1), output
    assert output.startswith(
        "error: the plug-in first.one cannot be imported (ModuleNotFoundError: No module named 'first')"
    )
    assert "PYTHONPATH" in output
    assert not (workplace / "gone").exists()


def test_one_that_fails_is_a_line_and_a_name_that_is_none_is_refused(workplace: Path) -> None:
    (workplace / "lab/broken.py").write_text("raise RuntimeError('two\\nlines')")
    for name, words in (("broken", "(RuntimeError: two lines)"), ("../lab/broken", "give one such as")):
        code, output = run(workplace, BD3_SCALE, "--plugin", name, "checkpoint", "list", "run")
        assert (code, output.count("\n")) == (2, 1), output
        assert words in output
    code, output = run(workplace, BD3_SCALE, "train", "recipe.yaml", "plugins=[../lab/broken]")
    assert code == 2
    assert "plugins.0: " in output
