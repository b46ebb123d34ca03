"""Check every option of a model: exported code computes what the layer does, and an import restores the option."""

from __future__ import annotations

import functools
import importlib
import json
import typing
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bd3_scale.attention.spans import make_spans
from bd3_scale.checkpoint.boxes import Box
from bd3_scale.checkpoint.manifest import CheckpointManifest, write_manifest
from bd3_scale.checkpoint.model import open_model
from bd3_scale.checkpoint.tensors import TensorReader, TensorWriter, same_bytes
from bd3_scale.convert.architectures import export_obstacles
from bd3_scale.convert.export import plan_export, run_export
from bd3_scale.convert.importer import plan_import, run_import
from bd3_scale.convert.remote_code_files import remote_code
from bd3_scale.model.build import build_model
from bd3_scale.model.layout import parameter_layouts
from bd3_scale.objective import NextToken
from bd3_scale.observe.libraries import without_broken_torchvision
from bd3_scale.parallel.groups import lone_groups
from bd3_scale.recipe.schema import ModelRecipe, MoeRecipe, RopeScaling
from tests.convert.models import BYTES, LLAMA3_ROPE
from tests.support.caches import read

BLOCK, LENGTH = 4, 24
PLAIN = ModelRecipe(num_layers=2, hidden_size=48, num_attention_heads=4, ffn_hidden_size=64)
# For every option a value other than PLAIN's, and the options that it needs.
OTHERWISE: dict[str, tuple[object, ...]] = {
    "num_layers": (3,),
    "hidden_size": (32,),
    "num_attention_heads": (2,),
    "num_query_groups": (2,),
    "head_dim": (16,),
    "ffn_hidden_size": (40,),
    "activation": ("gelu", "gelu_tanh"),
    "normalization": ("layernorm",),
    "norm_bias": (True,),
    "norm_eps": (0.1,),
    "qk_norm": (False,),
    "mlp_bias": (True,),
    "attention_bias": (True,),
    "head_bias": (True,),
    "tie_embeddings": (True,),
    "rope_theta": (100.0,),
    "rope_scaling": (RopeScaling(**{key: LLAMA3_ROPE[key] for key in RopeScaling.model_fields}),),
    "rotary_fraction": (0.5,),
    "moe": (
        MoeRecipe(num_experts=5, top_k=2, ffn_hidden_size=24),
        MoeRecipe(num_experts=4, top_k=1, ffn_hidden_size=24, normalize_top_k=False, first_dense_layers=1),
        MoeRecipe(num_experts=4, top_k=2, ffn_hidden_size=24, score="sigmoid", scale=2.5, shared_ffn_hidden_size=20),
        MoeRecipe(num_experts=4, top_k=1, ffn_hidden_size=24, score="sigmoid", bias=True),
        MoeRecipe(num_experts=6, top_k=3, ffn_hidden_size=24, groups=3, top_groups=2, bias=True),
    ),
    "init_std": (0.1,),
}
NEEDS = {"norm_bias": {"normalization": "layernorm"}, "rotary_fraction": {"head_dim": 16}}
# These change only initial weights; with the same weights the model is the same.
DRAWS_WEIGHTS = {"init_std"}


def test_every_option_is_here() -> None:
    missing = [name for name in ModelRecipe.model_fields if name not in OTHERWISE]
    assert not missing, f"add to OTHERWISE a value other than the default of {missing}"
    for name, field in ModelRecipe.model_fields.items():
        values = typing.get_args(field.annotation) if typing.get_origin(field.annotation) is typing.Literal else ()
        assert set(values) <= {getattr(PLAIN, name), *OTHERWISE[name]}, f"add every value of {name} to OTHERWISE"


def weights(model: ModelRecipe) -> dict[str, torch.Tensor]:
    """Return random tensors by their names in checkpoints; each is the same whatever other tensors there are."""
    how = {"dtype": torch.float32, "device": torch.device("cpu")}
    layouts = parameter_layouts(build_model(model, BYTES, lone_groups(), seed=None, **how))
    found = {}
    for key, shape in {piece.key: piece.full_shape for layout in layouts for piece in layout.pieces}.items():
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
        if key.endswith("norm.weight"):
            drawn = 1 + 0.3 * drawn
        elif not key.endswith("bias") and "embedding" not in key:
            drawn *= 2 / shape[-1] ** 0.5
        if shape[0] == BYTES.padded_size:
            drawn[BYTES.size :] = 0
        found[key] = drawn
    return found


def save(folder: Path, model: ModelRecipe) -> Path:
    folder.mkdir()
    writer = TensorWriter(folder)
    for key, tensor in weights(model).items():
        writer.add(Box(f"master.{key}", tensor, (0,) * tensor.ndim, tuple(tensor.shape)))
    writer.finish()
    manifest = CheckpointManifest(
        step=0,
        name="random",
        model=model,
        vocabulary=BYTES,
        precision="fp32",
        max_position_embeddings=LENGTH,
        objective="block_diffusion",
        block_size=BLOCK,
        states=("master",),
    )
    write_manifest(folder, manifest, writer.written)
    return folder


@pytest.fixture(scope="module")
def native_logits(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ModelRecipe], tuple[Path, torch.Tensor]]:
    """Return a checkpoint and the logits of `ids` as clean text; decoding gives the same for the last block."""

    @functools.cache
    def compute(model: ModelRecipe) -> tuple[Path, torch.Tensor]:
        checkpoint = save(tmp_path_factory.mktemp("native") / "checkpoint", model)
        positions = torch.arange(LENGTH).expand_as(ids())
        with open_model(checkpoint) as (native, _, _), torch.no_grad():
            spans = make_spans(torch.zeros(ids().shape, dtype=torch.int32), BLOCK)
            logits = native.clean_logits(ids(), positions, spans)[..., : BYTES.mask_id]
            cache = native.new_cache(len(ids()), LENGTH)
            start = LENGTH - BLOCK
            read(native, ids()[:, :start], BLOCK, cache)
            decoded = native.decode(ids()[:, start:], positions[:, start:], cache)[..., : BYTES.mask_id]
        assert difference(decoded, logits[:, start:]) < 1e-5
        return checkpoint, logits

    return compute


@pytest.fixture(scope="module")
def exported_logits(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], torch.Tensor]:
    """Return the same logits from an exported folder, computed by the code in it."""
    package = tmp_path_factory.mktemp("code") / "exported_code"
    package.mkdir()
    for name, source in remote_code("bd3").items():
        (package / name).write_text(source)
    with pytest.MonkeyPatch.context() as patch, without_broken_torchvision():
        patch.syspath_prepend(package.parent)
        code = importlib.import_module("exported_code.modeling_bd3")

    def compute(folder: Path) -> torch.Tensor:
        model = code.Bd3ForCausalLM(code.Bd3Config(**json.loads((folder / "config.json").read_text()))).eval()
        model.load_state_dict(load_file(folder / "model.safetensors"))
        with torch.no_grad():
            return model(ids(), use_cache=False).logits[..., : BYTES.mask_id]

    return compute


def ids() -> torch.Tensor:
    return torch.randint(0, BYTES.mask_id, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("option", "value"), [(name, value) for name, values in OTHERWISE.items() for value in values])
def test_the_exported_code_has_the_option_and_an_import_brings_it_back(
    option: str, value: object, native_logits, exported_logits, tmp_path: Path
) -> None:
    without = PLAIN.model_copy(update=NEEDS.get(option, {}))
    model = without.model_copy(update={option: value})
    checkpoint, expected = native_logits(model)
    assert (difference(expected, native_logits(without)[1]) > 1e-3) == (option not in DRAWS_WEIGHTS)

    run_export(plan_export(checkpoint, "bd3"), tmp_path / "exported", check=False)
    assert difference(exported_logits(tmp_path / "exported"), expected) < 1e-5

    plan = plan_import(tmp_path / "exported")
    run_import(plan, tmp_path / "back")
    assert plan.model == model.model_copy(update={"num_query_groups": model.query_groups, "head_dim": model.head_size})
    with TensorReader(checkpoint) as one, TensorReader(tmp_path / "back") as two:
        assert one.shapes == two.shapes
        for name, shape in one.shapes.items():
            assert same_bytes(*(reader.read(name, (0,) * len(shape), shape) for reader in (one, two))), name


def test_another_format_names_an_option_that_it_does_not_know() -> None:
    obstacles = export_obstacles(PLAIN.model_copy(update={"norm_bias": True}), NextToken)
    assert obstacles["qwen3"] == "it has norm_bias=True, which Qwen3ForCausalLM does not support"
    assert obstacles["llama"] == "it has q/k norm"


def test_an_import_has_the_default_of_what_its_configuration_lacks(native_logits, tmp_path: Path) -> None:
    run_export(plan_export(native_logits(PLAIN)[0], "bd3"), tmp_path / "exported", check=False)
    file = tmp_path / "exported" / "config.json"
    whole, model = json.loads(file.read_text()), plan_import(tmp_path / "exported").model
    options = {"initializer_range"} | {
        name for name, field in ModelRecipe.model_fields.items() if not field.is_required()
    }
    assert len(options & whole.keys()) > 6
    file.write_text(json.dumps({key: value for key, value in whole.items() if key not in options}))
    assert plan_import(tmp_path / "exported").model == model
    file.write_text(json.dumps(whole | {"qk_norm": "yes"}))
    with pytest.raises(ValueError, match=r"Bd3ForCausalLM describes no model: qk_norm: .* not 'yes'"):
        plan_import(tmp_path / "exported")
