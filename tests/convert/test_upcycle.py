"""Check dense checkpoints that become mixtures: equal logits at first, experts that diverge, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from bd3_scale.attention.spans import make_spans
from bd3_scale.checkpoint.manifest import read_manifest
from bd3_scale.checkpoint.model import open_model
from bd3_scale.checkpoint.tensors import TensorReader
from bd3_scale.convert.export import plan_export
from bd3_scale.convert.importer import plan_import, run_import
from bd3_scale.convert.upcycle import plan_upcycle, run_upcycle
from bd3_scale.recipe.schema import ModelRecipe
from tests.convert.models import (
    BYTES,
    LLAMA_SHAPE,
    OFFICIAL_SHAPE,
    QWEN_SHAPE,
    SDAR_MOE_SHAPE,
    TIED,
    native_checkpoint,
    save_folder,
    transformers_model,
)
from tests.support import forks
from tests.support.recipes import write_recipe
from tests.support.runs import losses

EXPERTS = "master.decoder.layers.mlp.experts"
THREE_LAYERS = QWEN_SHAPE.model_copy(update={"num_layers": 3})


def logits(checkpoint: Path) -> torch.Tensor:
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
    spans = make_spans(torch.zeros(ids.shape, dtype=torch.int32), 4)
    with open_model(checkpoint, torch.float32) as (model, _, _), torch.no_grad():
        return model.clean_logits(ids, torch.arange(24).expand(2, -1), spans)[..., :257]


def read(checkpoint: Path, name: str) -> torch.Tensor:
    with TensorReader(checkpoint) as reader:
        return reader.read(name, (0,) * len(reader.shapes[name]), reader.shapes[name])


@pytest.mark.parametrize("shape", [QWEN_SHAPE, TIED, LLAMA_SHAPE], ids=["qwen", "tied", "llama"])
@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (5, 3), (2, 2)])
def test_a_mixture_computes_what_the_dense_model_did(
    shape: ModelRecipe, experts: int, top_k: int, tmp_path: Path
) -> None:
    dense = native_checkpoint(tmp_path / "dense", shape, BYTES)
    run_upcycle(plan_upcycle(dense, num_experts=experts, top_k=top_k, bias=top_k == 3), tmp_path / "mixture")
    before, after = logits(dense), logits(tmp_path / "mixture")
    assert (after - before).abs().max() / before.abs().max() < 1e-5
    manifest = read_manifest(tmp_path / "mixture")
    assert manifest.model.moe is not None
    assert (manifest.model.moe.num_experts, manifest.model.moe.top_k) == (experts, top_k)
    assert manifest.vocabulary == BYTES
    assert manifest.imported_from == "dense checkpoint native, step 0"


def test_experts_are_copies_and_routers_are_drawn(tmp_path: Path) -> None:
    dense = native_checkpoint(tmp_path / "dense", THREE_LAYERS, BYTES)
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        plan = plan_upcycle(dense, num_experts=4, top_k=2, dense_layers=1, bias=True, seed=seed)
        run_upcycle(plan, tmp_path / name)
    fc1, fc2 = (read(tmp_path / "one", f"{EXPERTS}.linear_fc{i}.weight") for i in (1, 2))
    whole = [read(dense, f"ema.decoder.layers.mlp.linear_fc{i}.weight") for i in (1, 2)]
    assert fc1.shape == (2, 4, 2, 64, 48)
    for expert in range(4):
        assert torch.equal(fc1[:, expert].flatten(1, 2), whole[0][1:])
        assert torch.equal(fc2[:, expert], whole[1][1:])
    assert torch.equal(read(tmp_path / "one", "master.decoder.layers.mlp.linear_fc1.weight"), whole[0][:1])
    routers = [read(tmp_path / name, "master.decoder.layers.mlp.router.weight") for name in ("one", "again", "other")]
    assert torch.equal(routers[0], routers[1])
    assert not torch.equal(routers[0], routers[2])
    assert not torch.equal(routers[0][0], routers[0][1])
    assert routers[0].std() == pytest.approx(THREE_LAYERS.init_std, rel=0.2)
    assert not read(tmp_path / "one", "master.decoder.layers.mlp.router.expert_bias").any()


def test_an_import_becomes_a_mixture_that_is_exported_with_the_row_of_its_mask(tmp_path: Path) -> None:
    source = save_folder(tmp_path / "source", transformers_model("Qwen3", vocab_size=260))
    run_import(plan_import(source), tmp_path / "dense")
    run_upcycle(plan_upcycle(tmp_path / "dense", num_experts=2, top_k=1), tmp_path / "mixture")
    plans = [plan_export(tmp_path / name) for name in ("dense", "mixture")]
    assert [plan.kind for plan in plans] == ["qwen3", "qwen3_moe"]
    heads = []
    for plan in plans:
        with TensorReader(plan.checkpoint) as reader:
            heads += [plan.read(reader, tensor) for tensor in plan.tensors if tensor.is_table]
    assert torch.equal(heads[0], heads[2])
    assert torch.equal(heads[1], heads[3]), "the source's row at the mask's id"
    assert plans[1].config["eos_token_id"] == 256


def test_what_cannot_become_one(tmp_path: Path) -> None:
    mixture = native_checkpoint(tmp_path / "a" / "moe", SDAR_MOE_SHAPE, BYTES)
    with pytest.raises(ValueError, match="has experts already: 4 in a layer"):
        plan_upcycle(mixture, num_experts=4, top_k=2)
    gelu = native_checkpoint(tmp_path / "b" / "gelu", OFFICIAL_SHAPE, BYTES)
    with pytest.raises(ValueError, match=r"cannot become this mixture: experts are SwiGLU without biases"):
        plan_upcycle(gelu, num_experts=4, top_k=2)
    dense = native_checkpoint(tmp_path / "c" / "dense", QWEN_SHAPE, BYTES)
    with pytest.raises(ValueError, match=r"top_k=5 are more than"):
        plan_upcycle(dense, num_experts=4, top_k=5)
    with pytest.raises(ValueError, match=r"first_dense_layers=2 .* leave no layer with experts"):
        plan_upcycle(dense, num_experts=4, top_k=2, dense_layers=2)
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="exists"):
        run_upcycle(plan_upcycle(dense, num_experts=4, top_k=2), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.launch
def test_training_goes_on_from_it_and_experts_part(topics: Path, tmp_path: Path) -> None:
    """Check that the first step has the dense model's loss, and that balancing by biases begins with the first step."""
    common = {"data": {"path": str(topics)}, "optimizer": {"lr": 3e-3}}
    first = write_recipe(tmp_path / "dense.yaml", **common, train={"steps": 4}, run_dir="dense")
    forks.bd3_scale("train", first, cwd=tmp_path)
    options = ["--experts", 4, "--top-k", 2, "--bias", "--out", "mixture", "--json"]
    said = json.loads(forks.bd3_scale("convert", "upcycle", "dense", *options, cwd=tmp_path))
    model = yaml.safe_load(first.read_text())["model"]
    # As the result names it; how experts train is the recipe's own.
    moe = json.loads(said["model.moe"]) | {"aux_loss": 0.01}
    for run, start, changed in (("on", "dense", model), ("moe", "mixture", model | {"moe": moe})):
        recipe = write_recipe(
            tmp_path / f"{run}.yaml", **common, model=changed, train={"steps": 3}, init_from=start, run_dir=run
        )
        forks.bd3_scale("train", recipe, cwd=tmp_path)
    dense, mixture = losses(tmp_path / "on"), losses(tmp_path / "moe")
    assert mixture[1][0] == pytest.approx(dense[1][0], rel=1e-5)
    assert mixture[3][0] != pytest.approx(dense[3][0], rel=1e-5)
    trained = tmp_path / "moe" / "checkpoints" / "step-00000003"
    experts = read(trained, f"{EXPERTS}.linear_fc1.weight")
    for one in range(4):
        for other in range(one):
            assert (experts[:, one] - experts[:, other]).flatten(1).norm(dim=1).min() > 0
    assert read(trained, "ema.decoder.layers.mlp.router.expert_bias").any()
