"""Check that weights of a checkpoint can be read without knowing the options of the recipe that trained it.

There are two checkpoints: that of format 3 in `tests/fixtures`, and the same one in the current format. Their recipes
are changed as versions change recipes: an option was removed, one was renamed, and one is from a later version.
"""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from bd3_scale.checkpoint.formats import FORMAT
from bd3_scale.checkpoint.manifest import read_manifest, write_manifest
from bd3_scale.convert.export import plan_export, run_export
from bd3_scale.convert.inspect import inspect
from bd3_scale.data.manifest import load_manifest
from bd3_scale.evaluate.checkpoint import evaluate_checkpoint
from bd3_scale.evaluate.measured_text import data_recipe
from bd3_scale.generate.config import SamplingConfig
from bd3_scale.generate.source import open_writer
from bd3_scale.generate.text import default_min_entropy
from bd3_scale.observe.environment import source_commit
from bd3_scale.recipe.load import load_recipe
from bd3_scale.recipe.schema import DataRecipe
from bd3_scale.train.resume import check_initial
from tests.conftest import TESTS
from tests.faults.saving import sealed

EARLIER = TESTS / "fixtures" / "format-3"
CHECKPOINT = Path("run/checkpoints/step-00000006")
EXPECTED = json.loads((EARLIER / "expected.json").read_text())


def changed_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """Change the recipe as a version with other options would have written it."""
    recipe = json.loads(json.dumps(recipe))
    recipe["optimizer"]["amsgrad"] = True  # removed since then
    recipe["data"]["loader_processes"] = recipe["data"].pop("num_workers")  # renamed since then
    recipe["diffusion"]["token_editing"] = {"rate": 0.1}  # from a later version
    recipe["train"]["precision_of_logits"] = "fp8"
    recipe["optimizer"]["schedule"] = "polynomial"  # a value that no longer exists
    recipe["telemetry"] = {"every_steps": 5}
    return recipe


def in_todays_format(checkpoint: Path, recipe: dict[str, Any]) -> None:
    manifest = read_manifest(checkpoint)
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, manifest.model_copy(update={"trained_with": recipe}), {})


@pytest.fixture(params=["of format 3", "of today's format"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the checkpoint of a run with other options, with its data in the same folder."""
    shutil.copytree(EARLIER, tmp_path / "earlier")
    monkeypatch.chdir(tmp_path / "earlier")
    recipe = changed_recipe(json.loads((CHECKPOINT / "manifest.json").read_text())["recipe"])
    if request.param == "of format 3":
        (CHECKPOINT / "manifest.json").write_text(sealed(CHECKPOINT, recipe=recipe))
    else:
        in_todays_format(CHECKPOINT, recipe)
        assert json.loads((CHECKPOINT / "manifest.json").read_text())["format"] == FORMAT
    return CHECKPOINT


def test_options_of_other_versions_hinder_no_reader(checkpoint: Path, tmp_path: Path) -> None:
    with open_writer(checkpoint) as writer:
        (written,) = writer.write(["The "], SamplingConfig(max_new_tokens=24, temperature=0.0, unmasking="static"))
    assert written.tokens == EXPECTED["text_at_temperature_0"]
    (found,) = evaluate_checkpoint(checkpoint, draws=2)
    assert found.own
    assert found.nelbo == pytest.approx(EXPECTED["nelbo"]["8"], rel=1e-5)
    recipe = str(inspect(checkpoint, verify=True).details["recipe"])
    assert all(option in recipe for option in ("amsgrad: true", "loader_processes: 0", "every_steps: 5"))
    for folder, source in (("changed", checkpoint), ("unchanged", EARLIER / CHECKPOINT)):
        run_export(plan_export(source), tmp_path / folder, check=False)
    changed, unchanged = (tmp_path / folder / "model.safetensors" for folder in ("changed", "unchanged"))
    assert changed.read_bytes() == unchanged.read_bytes()
    assert "amsgrad: true" in (tmp_path / "changed" / "README.md").read_text()
    check_initial(checkpoint, read_manifest(checkpoint), load_recipe(Path("recipe.yaml")), load_manifest("data"))


def test_data_that_cannot_be_told_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EARLIER)
    manifest = read_manifest(CHECKPOINT)
    assert manifest.trained_with is not None
    for data in ({"folder": "data", "length": 64}, "data", None):
        other = manifest.model_copy(update={"trained_with": manifest.trained_with | {"data": data}})
        with pytest.raises(ValueError, match=r"cannot read which data the run was trained on, .*name .* with --data"):
            data_recipe(other, None)
        assert data_recipe(other, "data") == DataRecipe(path="data", seq_len=64)
        assert default_min_entropy(other) == 0.0 != default_min_entropy(manifest)


def test_what_wrote_a_checkpoint_is_told(tmp_path: Path) -> None:
    shutil.copytree(EARLIER / CHECKPOINT, tmp_path / "step-00000006")
    assert read_manifest(tmp_path / "step-00000006").writer == "bd3_scale unknown (commit unknown)"
    in_todays_format(tmp_path / "step-00000006", {})
    written_by = read_manifest(tmp_path / "step-00000006").written_by
    assert written_by.keys() == {"bd3_scale", "commit", "torch", "megatron-core", "deepspeed"}
    assert written_by["torch"] == version("torch")
    assert written_by["commit"] == source_commit()
