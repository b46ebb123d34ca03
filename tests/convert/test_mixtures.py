"""Check mixtures of experts of other software: what is accepted, what is refused, and the formats of an export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from bd3_scale.checkpoint.manifest import read_manifest
from bd3_scale.checkpoint.tensors import TensorReader
from bd3_scale.cli import app
from bd3_scale.convert.architectures import export_obstacles, read_architecture
from bd3_scale.convert.export import plan_export, run_export
from bd3_scale.convert.importer import plan_import, run_import
from bd3_scale.convert.inspect import inspect
from bd3_scale.convert.serving import engines
from bd3_scale.objective import BlockDiffusion, NextToken
from bd3_scale.recipe.schema import ModelRecipe
from tests.convert.models import (
    BYTES,
    EXPERTS,
    LLADA2_SHAPE,
    MIXTURE_SHAPE,
    QWEN_SHAPE,
    SDAR_MOE_SHAPE,
    config,
    native_checkpoint,
    save_folder,
    tensors,
    transformers_model,
)


@pytest.fixture(scope="module")
def natives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("natives")
    shapes = {"sdar_moe": SDAR_MOE_SHAPE, "llada2": LLADA2_SHAPE}
    return {name: native_checkpoint(place / name / "native", shape, BYTES) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def sources(natives: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save folders of three architectures."""
    place = tmp_path_factory.mktemp("sources")
    for name, native in natives.items():
        run_export(plan_export(native, name), place / name, check=False)
    qwen = transformers_model("Qwen3Moe", vocab_size=257, **EXPERTS, mlp_only_layers=[0])
    return {name: place / name for name in natives} | {"qwen3_moe": save_folder(place / "qwen3_moe", qwen)}


def edited(source: Path, to: Path, keys: dict) -> Path:
    """Copy a folder with other keys in its config.json; None removes a key."""
    shutil.copytree(source, to)
    changed = {key: value for key, value in (config(source) | keys).items() if value is not None}
    (to / "config.json").write_text(json.dumps(changed))
    return to


def same_checkpoints(first: Path, second: Path) -> bool:
    with TensorReader(first) as one, TensorReader(second) as two:
        assert one.shapes == two.shapes
        whole = [((name, (0,) * len(shape), shape)) for name, shape in one.shapes.items()]
        return all(torch.equal(one.read(*box), two.read(*box)) for box in whole)


@pytest.mark.slow
@pytest.mark.launch
def test_qwen3_moe_comes_back_as_it_went_in(sources: dict[str, Path], tmp_path: Path) -> None:
    source = sources["qwen3_moe"]
    run_import(plan_import(source), tmp_path / "native")
    plan = plan_export(tmp_path / "native")
    assert plan.kind == "qwen3_moe"
    run_export(plan, tmp_path / "back")
    before, after = tensors(source), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert config(tmp_path / "back")["mlp_only_layers"] == [0]


def test_experts_that_are_stacked_come_apart(sources: dict[str, Path], tmp_path: Path) -> None:
    apart = tensors(sources["llada2"])
    stacked = {name: tensor for name, tensor in apart.items() if ".experts." not in name}
    for layer in (1, 2):
        for part in ("gate_proj", "up_proj", "down_proj"):
            name = f"model.layers.{layer}.mlp.experts"
            stacked[f"{name}.{part}"] = torch.stack([apart[f"{name}.{e}.{part}.weight"] for e in range(6)])
    folder = shutil.copytree(sources["llada2"], tmp_path / "stacked")
    save_file(stacked, folder / "model.safetensors", {"format": "pt"})
    assert len(tensors(folder)) < len(apart)
    for name, source in (("one", sources["llada2"]), ("two", folder)):
        run_import(plan_import(source), tmp_path / name)
    assert same_checkpoints(tmp_path / "one", tmp_path / "two")
    assert len(inspect(folder).tensors) == len(stacked), "as the file has them"


@pytest.mark.parametrize(
    ("source", "keys", "message"),
    [
        ("sdar_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\] and decoder_sparse_step=1 has dense layers"),
        ("sdar_moe", {"decoder_sparse_step": 3}, r"decoder_sparse_step=3 has dense layers among its 2, but"),
        ("sdar_moe", {"mlp_only_layers": [0, 1]}, r"first_dense_layers=2 of model.num_layers=2 leave no layer"),
        ("sdar_moe", {"mlp_only_layers": "all"}, r"mlp_only_layers='all' in config.json is not of the type"),
        ("sdar_moe", {"num_experts": None}, r"has no 'num_experts', which SDARMoeForCausalLM needs"),
        ("sdar_moe", {"num_experts_per_tok": 5}, r"describes no model: .*top_k=5 are more than .*num_experts=4"),
        ("sdar_moe", {"num_experts": 10**15}, r"num_experts=10+, and mlp.gate has 4 rows in its weights"),
        ("sdar_moe", {"moe_intermediate_size": 10**15}, r"moe_intermediate_size=10+, and no tensor of its weights"),
        ("sdar_moe", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0.5 is not supported: 1 is"),
        ("sdar_moe", {"num_experts": 3}, r"of another shape: .*mlp\.gate\.weight \(4, 48\), not \(3, 48\)"),
        ("llada2", {"score_function": "softmax"}, r"score_function='softmax' is not supported: its published code"),
        ("llada2", {"norm_topk_prob": False}, r"norm_topk_prob=False is not supported"),
        ("llada2", {"use_qkv_bias": True}, r"use_qkv_bias=True is not supported"),
        ("llada2", {"use_qk_norm": False}, r"use_qk_norm=False is not supported"),
        ("llada2", {"using_split_qkv_in_self_attention": True}, r"using_split_qkv_in_self_attention=True is not supp"),
        ("llada2", {"n_group": 4}, r"num_experts=6 does not divide into model.moe.groups=4"),
        ("llada2", {"moe_router_enable_expert_bias": False}, r"not part of the model: .*mlp\.gate\.expert_bias"),
        ("llada2", {"partial_rotary_factor": 0.2}, r"partial_rotary_factor=0.2 .* turns 3 of 16 channels, and pairs"),
        ("llada2", {"num_attention_heads": 400}, r"num_attention_heads=400 of 16 channels, and query_key_value has"),
        ("llada2", {"mask_token_id": None, "num_token_ids": None}, r"no mask_token_id, and 156895 is none of its 258"),
        ("qwen3_moe", {"num_experts": 0}, r"moe.num_experts: .* greater than or equal to 1, not 0"),
    ],
)
def test_what_is_not_supported_is_named(source: str, keys: dict, message: str, sources, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        plan_import(edited(sources[source], tmp_path / "model", keys))


def test_transformers_5_has_another_name_for_the_number_of_experts(sources: dict[str, Path], tmp_path: Path) -> None:
    renamed = edited(sources["qwen3_moe"], tmp_path / "model", {"num_experts": None, "num_local_experts": 4})
    assert plan_import(renamed).model == plan_import(sources["qwen3_moe"]).model


def test_what_published_models_of_llada2_do_not_say(sources: dict[str, Path], tmp_path: Path) -> None:
    says_nothing = {"mask_token_id": None, "block_size": None, "num_token_ids": None}
    folder = edited(sources["llada2"], tmp_path / "model", says_nothing)
    plan = plan_import(folder, mask_id=257)
    assert (plan.vocabulary.mask_id, plan.diffusion.block_size) == (257, 32)
    assert plan_import(folder, mask_id=257, block_size=4).diffusion.block_size == 4
    with pytest.raises(ValueError, match=r"the model's mask has the id 65, and in the tokeniser"):
        plan_import(folder, mask_id=65)
    with pytest.raises(ValueError, match=r"mask_id=3 is not the mask of LLaDA2MoeModelLM: .* mask_token_id=257"):
        plan_import(sources["llada2"], mask_id=3)
    with pytest.raises(
        ValueError, match=r"mask_id=3 is for models with a mask token, and Qwen3Moe.* --mask-token names"
    ):
        plan_import(sources["qwen3_moe"], mask_id=3)
    real = config(folder) | {"vocab_size": 157184}
    assert read_architecture(real).mask_id == 156895
    command = ["convert", "import", str(folder), "--out", str(tmp_path / "out"), "--mask-id", "257", "--json"]
    said = json.loads(CliRunner().invoke(app, command, catch_exceptions=False).output)
    assert (said["mask id"], said["block size"]) == ("257, the model's own", 32)
    assert read_manifest(tmp_path / "out").model.moe == LLADA2_SHAPE.moe


def test_which_formats_a_mixture_can_become() -> None:
    def possible(model: ModelRecipe, objective: type = BlockDiffusion, **moe: object) -> list[str]:
        changed = model if model.moe is None else model.model_copy(update={"moe": model.moe.model_copy(update=moe)})
        return [name for name, obstacle in export_obstacles(changed, objective).items() if obstacle is None]

    assert possible(SDAR_MOE_SHAPE) == ["sdar_moe", "bd3"]
    assert possible(SDAR_MOE_SHAPE, aux_loss=0.1, z_loss=0.1, bias_update_rate=0.5) == ["sdar_moe", "bd3"]
    assert possible(SDAR_MOE_SHAPE, NextToken) == ["qwen3_moe"]
    assert possible(SDAR_MOE_SHAPE, NextToken, first_dense_layers=1, normalize_top_k=False) == ["qwen3_moe"]
    assert possible(LLADA2_SHAPE) == ["llada2", "bd3"]
    assert possible(QWEN_SHAPE) == ["sdar", "bd3"]
    assert possible(QWEN_SHAPE, NextToken) == ["qwen3"]
    assert possible(MIXTURE_SHAPE) == ["bd3"]
    for option, value in {
        "shared_ffn_hidden_size": 24,
        "first_dense_layers": 1,
        "normalize_top_k": False,
        "scale": 2.0,
        "groups": 2,
        "bias": True,
    }.items():
        assert possible(SDAR_MOE_SHAPE, **{option: value}) == ["bd3"], option
    for option, value in {"shared_ffn_hidden_size": 30, "bias": False, "normalize_top_k": False}.items():
        assert possible(LLADA2_SHAPE, **{option: value}) == ["bd3"], option
    found = export_obstacles(LLADA2_SHAPE, BlockDiffusion)
    assert found["sdar"] == "it has experts"
    assert found["sdar_moe"] == "it has moe.shared_ffn_hidden_size=48, and SDARMoeForCausalLM supports only 0"
    assert export_obstacles(QWEN_SHAPE, BlockDiffusion)["sdar_moe"] == "it has no experts"


def test_engines_and_what_they_read(sources: dict[str, Path]) -> None:
    found = config(sources["sdar_moe"])
    keys = {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "num_experts_per_tok": 2}
    assert keys.items() <= found.items()
    assert found["auto_map"]["AutoModelForCausalLM"] == "modeling_sdar_moe.SDARMoeForCausalLM"
    assert (sources["sdar_moe"] / "sglang.yaml").is_file()
    found = config(sources["llada2"])
    keys = {"score_function": "sigmoid", "moe_router_enable_expert_bias": True, "router_dtype": "fp32"}
    keys |= {"num_shared_experts": 2, "embedding_dropout": 0.0, "rotary_dim": 8, "model_type": "llada2_moe"}
    assert keys.items() <= found.items()
    runs = {e.name: e.runs for e in engines("llada2", 156895)}
    assert runs["SGLang"]
    assert not runs["LMDeploy, JetEngine, Diffulex"]
    assert not next(e for e in engines("llada2", 151669) if e.name == "SGLang").runs
    assert {e.name: e.runs for e in engines("sdar_moe", 151669)}["LMDeploy"]


@pytest.mark.parametrize(("kind", "mask_id"), [("sdar_moe", 151669), ("llada2", 156895)])
def test_the_mask_moves_to_where_engines_look(kind: str, mask_id: int, natives: dict[str, Path]) -> None:
    plan = plan_export(natives[kind], mask_id=mask_id)
    assert plan.config["mask_token_id"] == mask_id
    embedding = next(t for t in plan.tensors if t.is_embedding)
    assert embedding.shape[0] == plan.config["vocab_size"] == mask_id + 1
    with pytest.raises(ValueError, match="below 16777216: engines expect"):
        plan_export(natives[kind], mask_id=1 << 24)


@pytest.mark.slow
@pytest.mark.launch
def test_biases_of_experts_keep_their_precision(natives: dict[str, Path], tmp_path: Path) -> None:
    plan = plan_export(natives["llada2"], dtype="bfloat16")
    run_export(plan, tmp_path / "out")
    found = {name: tensor.dtype for name, tensor in tensors(tmp_path / "out").items()}
    assert {name for name, dtype in found.items() if dtype == torch.float32} == {
        f"model.layers.{layer}.mlp.gate.expert_bias" for layer in (1, 2)
    }
    run_import(plan_import(tmp_path / "out"), tmp_path / "back")
    run_export(plan_export(tmp_path / "back"), tmp_path / "again", check=False)
    before, after = tensors(tmp_path / "out"), tensors(tmp_path / "again")
    assert all(torch.equal(before[name], after[name]) for name in before)
