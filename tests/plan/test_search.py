"""Check that a search's estimates are near whole traces, and that the layouts it names fit and keep the rules."""

from __future__ import annotations

import pytest

from bd3_scale.plan.forecast import assemble, forecast, traced_stages
from bd3_scale.plan.hardware import load_hardware
from bd3_scale.plan.search import MEMORY_ERROR, ROOM, TIME_ERROR, search
from bd3_scale.plan.stages import Parts, Split, shapes, small_job
from bd3_scale.plan.workers import trace_all
from bd3_scale.recipe.checks import check_recipe
from bd3_scale.recipe.schema import Recipe
from bd3_scale.recipe.vocabulary import Vocabulary

pytestmark = pytest.mark.launch
VOCABULARY = Vocabulary(size=32000, eos_id=0, mask_id=31999)
HARDWARE = load_hardware("h100")


def recipe(
    *, layers: int = 4, tied: bool = False, batch: int = 16, size: int = 1, recompute="none", moe=None, **parallel
) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "medium",
            "model": {"num_layers": layers, "hidden_size": 2048, "num_attention_heads": 16, "num_query_groups": 8}
            | {"ffn_hidden_size": 5632, "tie_embeddings": tied, "moe": moe},
            "diffusion": {"block_size": 16},
            "data": {"path": "none", "seq_len": 4096},
            "train": {"steps": 1, "global_batch_size": batch, "micro_batch_size": size, "precision": "bf16"}
            | {"recompute": recompute},
            "parallel": parallel,
        }
    )


SPARSE = recipe(
    layers=9, batch=64, expert=4, moe={"num_experts": 16, "top_k": 4, "ffn_hidden_size": 1024, "first_dense_layers": 1}
)
LAYOUTS = {
    "pipeline": (8, recipe(tensor=2, sequence=True, pipeline=2)),
    "one stage": (16, recipe(layers=8, size=2, batch=64)),
    "interleaved, tied": (8, recipe(layers=8, tied=True, pipeline=2, virtual_pipeline=2, size=4, batch=64)),
    "four stages, recomputed": (16, recipe(layers=8, pipeline=4, recompute="full", batch=32, size=2)),
    "experts": (8, SPARSE),
    "experts of two stages, recomputed": (
        16,
        recipe(
            layers=8,
            batch=32,
            tensor=2,
            sequence=True,
            pipeline=2,
            expert=4,
            recompute="full",
            moe={"num_experts": 16, "top_k": 2, "ffn_hidden_size": 1024, "shared_ffn_hidden_size": 1024}
            | {"first_dense_layers": 2, "score": "sigmoid", "bias": True},
        ),
    ),
    "selective": (8, recipe(layers=8, tensor=4, sequence=True, recompute="selective", size=8, batch=64)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_an_estimate_is_near_a_whole_trace(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gpus, wanted = LAYOUTS[name]
    split = Split(wanted.parallel.tensor, 1, 1, wanted.parallel.expert)
    traced = {}
    for recompute in dict.fromkeys(["none", wanted.train.recompute]):
        small = shapes(recompute, wanted.model)
        jobs = [small_job(wanted, VOCABULARY, split, shape) for shape in small]
        traced |= dict(zip(small, trace_all(jobs, HARDWARE, device="cuda"), strict=True))
    parts = Parts(split, traced)
    stages = {stage: parts.stage(wanted, gpus, stage) for stage in traced_stages(wanted)}
    estimate = assemble(wanted, VOCABULARY, gpus, HARDWARE, stages)
    whole = forecast(wanted, VOCABULARY, gpus, HARDWARE)
    assert estimate.time.seconds == pytest.approx(whole.time.seconds, rel=TIME_ERROR)
    # The number of the head's rows is random.
    assert estimate.time.needed == pytest.approx(whole.time.needed, rel=1e-3)
    assert estimate.parameters == whole.parameters
    for found, exact in zip(estimate.ranks, whole.ranks, strict=True):
        assert found.card_bytes == pytest.approx(exact.card_bytes, rel=MEMORY_ERROR)


@pytest.mark.slow
def test_what_is_found_fits_and_keeps_the_rules(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    told = []
    found = search(recipe(), VOCABULARY, 4, HARDWARE, best=1, progress=lambda *counts: told.append(counts))
    assert found.reason is None
    best, *others = found.layouts
    assert best.verified
    assert best.seconds < min(each.seconds for each in others) * 1.05
    assert best.margin_bytes >= ROOM * HARDWARE.memory_bytes
    for each in found.layouts:
        check_recipe(each.forecast.recipe, 4)
    assert told[-1][0] == told[-1][1]
    # The overrides that a person pastes give the recipe that was predicted.
    values = dict(pair.split("=") for pair in found.overrides(best))
    assert int(values.get("train.micro_batch_size", 1)) == best.forecast.recipe.train.micro_batch_size


@pytest.mark.slow
def test_where_nothing_fits_it_says_what_is_lacking(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tiny = HARDWARE.model_copy(update={"memory_gb": 3.5})
    one_head = recipe(batch=1)
    model = one_head.model.model_copy(update={"num_attention_heads": 1, "num_query_groups": 1, "head_dim": 128})
    found = search(one_head.model_copy(update={"model": model}), VOCABULARY, 1, tiny)
    assert found.layouts == []
    assert "fits 1 NVIDIA H100" in found.reason
    assert "lacks" in found.reason


def test_shapes_of_a_split_are_few():
    """Check six steps for each way to split layers and two for each way to recompute, which bound a search's time, and
    half as many more where dense layers precede sparse ones.
    """

    def counts(model) -> list[int]:
        return [len(shapes(recompute, model)) for recompute in ("none", "selective", "full")]

    mixed = SPARSE.model
    assert mixed.moe is not None
    only_experts = mixed.model_copy(update={"moe": mixed.moe.model_copy(update={"first_dense_layers": 0})})
    assert counts(recipe().model) == counts(only_experts) == [6, 2, 2]
    assert counts(mixed) == [9, 3, 3]
    assert all(shape.layers in (3, 4) for shape in shapes("full", mixed))
