"""Check that the starter project's commands run as its README shows them."""

from __future__ import annotations

import os
import pydoc_data.topics
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bd3_scale.project.starter import make_project
from bd3_scale.recipe.checks import check_recipe
from bd3_scale.recipe.load import load_recipe

COMMAND = [sys.executable, "-m", "bd3_scale"]


def commands(folder: Path) -> list[str]:
    (first, _) = re.findall(r"^```\n(.*?)^```", (folder / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return first.splitlines()


def test_a_project_has_a_sound_recipe_and_its_own_name(tmp_path: Path) -> None:
    files = make_project(tmp_path / "my model")
    recipe = load_recipe(tmp_path / "my model/recipe.yaml")
    check_recipe(recipe, recipe.launch.processes or 1)
    assert recipe.name == "my-model"
    assert {file.name for file in files} == {"text", "recipe.yaml", "README.md", ".gitignore"}
    assert len(commands(tmp_path / "my model")) == 6
    assert {"data/", "runs/"} <= set((tmp_path / "my model/.gitignore").read_text().split())


@pytest.mark.parametrize("name", ["._x", "ä ö", "-", "a$(b)c"])
def test_every_name_of_a_folder_gives_a_name_of_a_run(tmp_path: Path, name: str) -> None:
    make_project(tmp_path / name)
    assert load_recipe(tmp_path / name / "recipe.yaml").name


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        make_project(tmp_path)
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        make_project(tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.slow
@pytest.mark.launch
def test_its_six_commands_lead_from_text_to_a_model_that_writes(tmp_path: Path) -> None:
    make_project(tmp_path / "mine")
    for name, text in pydoc_data.topics.topics.items():
        (tmp_path / f"mine/text/{name.replace('/', '-')}.txt").write_text(text)
    short = ["train.steps=4", "optimizer.decay_steps=2", "optimizer.warmup_steps=1", "evaluation.every_steps=2"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    for line in commands(tmp_path / "mine"):
        name, *words = shlex.split(line)
        assert name == "bd3-scale"
        done = subprocess.run(
            [*COMMAND, *words, *(short if words[0] == "train" else [])],
            cwd=tmp_path / "mine",
            env=environment,
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert "The " in done.stdout


@pytest.mark.parametrize("name", ["123", "true", "1e5"])
def test_a_name_that_yaml_takes_for_a_number_is_text(tmp_path: Path, name: str) -> None:
    make_project(tmp_path / name)
    assert load_recipe(tmp_path / name / "recipe.yaml").name == name


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    program = "import sys; from pathlib import Path; from bd3_scale.project.starter import make_project as make; "
    limited = subprocess.run(
        ["bash", "-c", 'ulimit -f 1; exec "$@"', "-", sys.executable, "-c", program + "make(Path('new'))"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "File too large" in limited.stderr
    assert list(tmp_path.iterdir()) == []
