"""Check what `bd3-scale doctor --recipe` says of a recipe on this machine before a run."""

from __future__ import annotations

import json
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bd3_scale.cli import app
from bd3_scale.data.prepare import prepare
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.launch.findings import Finding, checked
from bd3_scale.observe.environment import Environment, Gpu
from bd3_scale.project import needs as needs_module
from bd3_scale.project.needs import needs
from bd3_scale.recipe.load import load_recipe
from bd3_scale.recipe.schema import Recipe
from tests.support.recipes import write_recipe, write_topics

HERE = Environment({}, "a CPU", 4, None, (), ())
FOUR_GPUS = replace(HERE, cuda="13.0", gpus=(Gpu("H100", 79.6, "9.0"),) * 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a recipe and its prepared data."""
    made = tmp_path_factory.mktemp("needs")
    prepare([write_topics(made / "text")], made / "data", load_tokenizer("bytes"), 64, workers=1, progress=False)
    write_recipe(made / "recipe.yaml", data={"path": str(made / "data")}, run_dir=str(made / "run"))
    return made


def recipe(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(folder / "recipe.yaml", overrides)


def broken(found: list[Finding]) -> dict[str, Finding]:
    return {each.name: each for each in found if each.verdict != "ok"}


def test_a_recipe_that_fits_has_only_what_is_ok(folder: Path) -> None:
    found = needs(recipe(folder), HERE)
    assert broken(found) == {}
    assert [each.name for each in found] == [
        *("layout", "processes", "precision", "attention", "data", "memory of a rank", "disk for checkpoints")
    ]


@pytest.mark.parametrize(
    ("overrides", "environment", "name", "verdict", "words"),
    [
        (["launch.processes=3"], HERE, "rules", "problem", "train.global_batch_size=8 does not divide"),
        (["launch.processes=8", "train.micro_batch_size=1"], FOUR_GPUS, "processes", "problem", "8 on 4 GPUs"),
        (["launch.processes=8", "train.micro_batch_size=1"], HERE, "processes", "warning", "8 on 4 CPU cores"),
        (["data.seq_len=128"], HERE, "data", "problem", "was prepared with seq_len=64"),
        (["data.path=nowhere"], HERE, "data", "problem", "does not exist"),
        (["data.remote=/nowhere"], HERE, "data", "problem", "/nowhere"),
        (["data.remote=gopher://x/y"], HERE, "gopher://", "problem", "gopher"),
        (["attention_backend=triton"], HERE, "attention", "problem", "cannot run"),
        (["plugins=[no_such_module]"], HERE, "plug-ins", "problem", "no_such_module"),
        (["diffusion.block_size=64"], HERE, "data", "problem", "document_multiple=32"),
    ],
)
def test_what_does_not_fit_is_named_with_the_fix(folder, overrides, environment, name, verdict, words) -> None:
    found = broken(needs(recipe(folder, *overrides), environment))
    assert (found[name].verdict, bool(found[name].fix)) == (verdict, True)
    assert words in found[name].value


def test_bf16_where_it_is_emulated_is_a_warning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs_module, "has_fast_bf16", lambda: False)
    assert broken(needs(recipe(folder, "train.precision=bf16"), HERE))["precision"].verdict == "warning"
    assert broken(needs(recipe(folder, "train.precision=auto"), HERE)) == {}


def test_a_model_beyond_memory_and_disk_is_a_problem(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huge = recipe(folder, "model.ffn_hidden_size=20_000_000", "launch.processes=4", "parallel.tensor=1")
    # 2 layers of 3 matrices of 32 x 20 million: 3.84 billion weights, of which a rank has a quarter of the states.
    small = replace(FOUR_GPUS, gpus=(Gpu("small", 30.0, "9.0"),) * 4)
    monkeypatch.setattr(needs_module.shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(100 * 10**9))
    found = broken(needs(huge, small))
    assert set(found) == {"memory of a rank", "disk for checkpoints"}
    assert "3,840 M parameters" in found["memory of a rank"].value
    # Master weights, two moments and the moving average in fp32: 61 GB a checkpoint, of which two and a new one.
    assert found["disk for checkpoints"].value.startswith("184 GB of 100 GB free")
    fits = replace(FOUR_GPUS, gpus=(Gpu("large", 80.0, "9.0"),) * 4)
    assert "memory of a rank" not in broken(needs(huge, fits))


def test_tensorboard_needs_its_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wish = recipe(folder, "logging.tensorboard=true")
    assert broken(needs(wish, HERE)) == {}
    monkeypatch.setattr(needs_module.importlib.util, "find_spec", lambda name: None)
    assert "pip install" in broken(list(needs_module.packages(wish)))["TensorBoard"].fix


def test_nothing_is_made_where_a_run_would_be(folder: Path) -> None:
    needs(recipe(folder, f"run_dir={folder}/deep/down/run"), HERE)
    assert not (folder / "deep").exists()
    assert not (folder / "run").exists()


def test_a_finding_that_is_not_ok_needs_a_fix() -> None:
    with pytest.raises(ValueError, match="names no fix"):
        Finding("topic", "name", "value", "warning", "rule")
    assert checked("topic", "name", "value", rule="rule", fix="do", broken=False).fix == ""


@pytest.mark.slow
def test_the_table_has_a_column_of_fixes_and_json_has_them_too(folder: Path) -> None:
    words = ["doctor", "--recipe", str(folder / "recipe.yaml"), "--folder", str(folder), "data.seq_len=128"]
    table = CliRunner().invoke(app, words, env={"COLUMNS": "220"})
    assert table.exit_code == 1
    header = next(line for line in table.output.splitlines() if "rule" in line)
    assert [cell.strip() for cell in header.strip("┃").split("┃")][-3:] == ["found", "rule", "fix"]
    assert "prepare the data" in table.output
    (problem,) = (
        each
        for each in json.loads(CliRunner().invoke(app, [*words, "--json"]).output)["recipe"]
        if each["verdict"] == "problem"
    )
    assert "prepared with seq_len=64" in problem["value"]
    assert "prepare the data" in problem["fix"]


def test_values_without_a_recipe_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="--recipe"):
        CliRunner().invoke(app, ["doctor", "train.steps=3"], catch_exceptions=False)
