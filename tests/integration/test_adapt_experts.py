"""Adapt a mixture of experts of transformers to block diffusion, only through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from bd3_scale.attention.spans import make_spans
from bd3_scale.checkpoint.model import open_model
from bd3_scale.checkpoint.tensors import TensorReader
from tests.convert.models import EXPERTS, config, save_folder, tensors, transformers_model
from tests.support import forks
from tests.support.recipes import tiny_recipe, write_topics
from tests.support.runs import losses

pytestmark = pytest.mark.slow

STEPS = 6
BALANCE = {"moe": {"aux_loss": 0.01, "z_loss": 0.001}}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with text, a model of transformers, a recipe, and the finished run `run` on two ranks."""
    folder = tmp_path_factory.mktemp("adapt")
    write_topics(folder / "text")
    save_folder(folder / "model", transformers_model("Qwen3Moe", vocab_size=257, num_key_value_heads=2, **EXPERTS))
    schedule = [{"block_size": 1, "steps": 2}]
    recipe = tiny_recipe(
        name="adapt",
        model=BALANCE,
        diffusion={"block_size_schedule": schedule},
        train={"steps": STEPS},
        parallel={"expert": 2},
        run_dir="run",
    )
    recipe["model"] = BALANCE
    (folder / "adapt.yaml").write_text(yaml.safe_dump(recipe))
    forks.bd3_scale("adapt", "model", "adapt.yaml", "--text", "text", cwd=folder)
    return folder


def test_the_run_begins_with_the_import_and_trains_experts_as_the_recipe_says(workplace: Path) -> None:
    recipe = yaml.safe_load((workplace / "run" / "adapt.yaml").read_text())
    assert recipe["model"]["moe"]["num_experts"] == EXPERTS["num_experts"]
    assert recipe["model"]["moe"]["aux_loss"] == BALANCE["moe"]["aux_loss"]
    assert recipe["init_from"] == "run/initial"
    assert sorted(losses(workplace / "run")) == list(range(1, STEPS + 1))
    checkpoint = workplace / "run" / "checkpoints" / f"step-{STEPS:08d}"
    with TensorReader(workplace / "run" / "initial") as before, TensorReader(checkpoint) as after:
        for part in ("router.weight", "experts.linear_fc1.weight", "experts.linear_fc2.weight"):
            name = f"master.decoder.layers.mlp.{part}"
            old, new = (
                reader.read(name, (0,) * len(before.shapes[name]), before.shapes[name]) for reader in (before, after)
            )
            assert 0 < (new - old).norm() / old.norm() < 0.2


def test_it_is_exported_for_engines_and_comes_back(workplace: Path) -> None:
    said = json.loads(forks.bd3_scale("convert", "export", "run", "--out", "served", "--json", cwd=workplace))
    assert said["format"] == "SDARMoeForCausalLM"
    assert said["SGLang"].startswith("does not run it: it takes 151669")
    assert config(workplace / "served")["block_size"] == 8
    names = tensors(workplace / "served").keys()
    assert "model.layers.3.mlp.experts.3.down_proj.weight" in names
    forks.bd3_scale("convert", "import", "served", "--out", "again", cwd=workplace)
    ids = torch.arange(24)[None]
    spans, found = make_spans(torch.zeros(1, 24, dtype=torch.int32), 8), []
    for folder in ("again", f"run/checkpoints/step-{STEPS:08d}"):
        with open_model(workplace / folder) as (model, _, _), torch.no_grad():
            found.append(model.clean_logits(ids, torch.arange(24)[None], spans))
    assert torch.equal(*found)
    options = ["--prompt", "The", "--max-new-tokens", 9, "--temperature", 0, "--min-entropy", 0, "--json"]
    written = [json.loads(forks.bd3_scale("generate", name, *options, cwd=workplace)) for name in ("run", "again")]
    assert written[0]["tokens"] == written[1]["tokens"]


@pytest.mark.parametrize("model", [{"moe": {"num_experts": 8}}, {"moe": {"aux_loss": 0.1}, "num_layers": 4}])
def test_what_the_model_decides_is_not_the_recipe_s(model: dict, workplace: Path) -> None:
    recipe = yaml.safe_load((workplace / "adapt.yaml").read_text())
    (workplace / "other.yaml").write_text(yaml.safe_dump(recipe | {"model": model, "run_dir": "other"}))
    said = forks.bd3_scale("adapt", "model", "other.yaml", "--text", "text", cwd=workplace, returncode=2)
    assert "model: is decided by the model that is adapted" in " ".join(said.split())
    assert not (workplace / "other").exists()
