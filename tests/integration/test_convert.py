"""Check an imported model on every split of matrices and layers: it has transformers' logits, and what it saves can be
exported again.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bd3_scale.checkpoint.tensors import TensorReader
from bd3_scale.convert.export import plan_export, run_export
from bd3_scale.convert.importer import plan_import, run_import
from tests.convert.models import LLAMA3_ROPE, config, save_folder, tensors, transformers_model
from tests.integration import convert_ranks
from tests.support.forks import run_ranks

LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "tp2 pp2": (4, {"tensor": 2, "pipeline": 2}),
    "tp4": (4, {"tensor": 4}),
    "pp4": (4, {"pipeline": 4}),
}


@pytest.fixture(scope="module", params=["Qwen3", "Llama"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Return a model of transformers, its folder, its import, token ids and their logits."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "Qwen3":
        model = transformers_model("Qwen3", vocab_size=257, rope_theta=1e6)
    else:
        # The vocabulary has unused rows, so that the mask takes one of them.
        model = transformers_model("Llama", vocab_size=260, tie_word_embeddings=True, rope_scaling=LLAMA3_ROPE)
    source = save_folder(folder / "source", model)
    imported = folder / "imported"
    run_import(plan_import(source), imported)
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return source, imported, ids, model(ids).logits


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_round_trips(layout: str, case, tmp_path: Path) -> None:
    source, imported, ids, expected = case
    world_size, parallel = LAYOUTS[layout]
    run_ranks(
        convert_ranks.logits_and_training_checkpoint,
        world_size,
        imported,
        parallel,
        ids,
        tmp_path,
        logs=tmp_path / "logs",
    )
    found = torch.load(tmp_path / "logits.pt")
    difference = (found[..., :257] - expected[..., :257]).abs().max() / expected.abs().max()
    assert difference < 1e-5
    assert found[..., 257].isneginf().all(), "the mask is never predicted"

    exported = tmp_path / "exported"
    run_export(plan_export(tmp_path / "step-00000000", dtype="float32"), exported, check=False)
    before, after = tensors(source), tensors(exported)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        differs = (tensor != after[name]).reshape(len(tensor), -1).any(1).nonzero().flatten().tolist()
        # The row of an unused id has become the mask's embedding.
        assert differs == ([257] if name == "model.embed_tokens.weight" and len(tensor) > 257 else []), name
    old, new = config(source), config(exported)
    assert {key: new[key] for key in ("architectures", "vocab_size", "rope_theta", "tie_word_embeddings")} == {
        key: old[key] for key in ("architectures", "vocab_size", "rope_theta", "tie_word_embeddings")
    }

    again = tmp_path / "again"
    run_import(plan_import(exported), again)
    same_values(imported, again, "master", "master", mask_row_too=source.parent.name.startswith("Qwen3"))


def same_values(first: Path, second: Path, state: str, other: str, *, mask_row_too: bool) -> None:
    """Check that every native tensor of two checkpoints is bitwise the same."""
    with TensorReader(first) as one, TensorReader(second) as two:
        keys = {name.removeprefix(f"{state}.") for name in one.shapes if name.startswith(f"{state}.")}
        assert keys == {name.removeprefix(f"{other}.") for name in two.shapes if name.startswith(f"{other}.")}
        for key in keys:
            shape = one.shapes[f"{state}.{key}"]
            zeros = (0,) * len(shape)
            a, b = one.read(f"{state}.{key}", zeros, shape), two.read(f"{other}.{key}", zeros, shape)
            if not mask_row_too and "embedding" in key:
                a[257], b[257] = 0, 0
            assert torch.equal(a, b), key
