"""Derive the trace of a large step from those of small steps.

Layers between a chunk's first and last are alike, and so are micro-batches. Work and messages of a step are therefore
linear in the number of layers of each sort and in the number of micro-batches, and memory is linear in the layers. A
few steps of three and four layers with few micro-batches determine these linear functions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bd3_scale.plan.job import Job
from bd3_scale.recipe.schema import Recipe

# A first layer, a last one, and one between them.
_LAYERS = 3


@dataclass(frozen=True)
class Sample:
    """A small step, and its weights in the sums for the work, and for the memory, of the whole step; see `combine`."""

    job: Job
    weight: float
    memory_weight: float


def samples(job: Job, stage: int) -> list[Sample]:
    """Return the small steps that determine the step of `job`, a rank of the pipeline's stage `stage`."""
    by_layers = _by_layers(job.recipe, stage)
    by_batches = _by_batches(job.recipe, job.micro_batches)
    most = by_batches[-1][0]
    return [
        Sample(
            replace(job, recipe=recipe, micro_batches=count, whole=job.recipe.model),
            weight=layer_weight * batch_weight,
            memory_weight=layer_weight * (count == most),
        )
        for recipe, layer_weight in by_layers
        for count, batch_weight in by_batches
    ]


def _by_batches(recipe: Recipe, wanted: int) -> list[tuple[int, float]]:
    """Return numbers of micro-batches with weights; the last one keeps as many activations alive as the whole step."""
    stages = recipe.parallel.pipeline
    group = stages if recipe.parallel.virtual_pipeline > 1 else 1
    few, more = 2 * stages, 2 * stages + group
    if wanted <= more:
        return [(wanted, 1.0)]
    share = (wanted - few) / (more - few)
    return [(few, 1 - share), (more, share)]


def _by_layers(recipe: Recipe, stage: int) -> list[tuple[Recipe, float]]:
    """Return recipes with fewer layers, and their weights."""
    parallel, train = recipe.parallel, recipe.train
    chunks = parallel.chunks(recipe.model.num_layers)
    mine = chunks[stage :: parallel.pipeline]
    # Chunks of unequal length are traced whole, and so is ZeRO-3, whose prefetching depends on the sizes of all layers.
    if len(set(mine)) > 1 or parallel.zero_stage == 3:
        return [(recipe, 1.0)]
    recomputed = min(train.recompute_layers or mine[0], mine[0]) if train.recompute == "full" else 0
    wanted = (recomputed, mine[0] - recomputed)
    # The layers without experts, which come first, must all be in the small model.
    few = max(_LAYERS, recipe.model.dense_layers + 2) if recipe.model.moe else _LAYERS
    base = (min(wanted[0], few), min(wanted[1], few))
    more = [(kind, wanted[kind] - base[kind]) for kind in (0, 1) if wanted[kind] > base[kind]]
    if sum(wanted) <= sum(base) + len(more):
        return [(recipe, 1.0)]
    weighted = [(_with_layers(recipe, base), 1.0 - sum(extra for _, extra in more))]
    for kind, extra in more:
        layers = (base[0] + (kind == 0), base[1] + (kind == 1))
        weighted.append((_with_layers(recipe, layers), float(extra)))
    return weighted


def _with_layers(recipe: Recipe, layers: tuple[int, int]) -> Recipe:
    """Return the recipe with these numbers of layers a chunk: recomputed ones, and others."""
    parallel = recipe.parallel.model_copy(update={"layers_per_chunk": None})
    chunks = parallel.pipeline * parallel.virtual_pipeline
    kept = layers[0] if layers[0] and layers[1] else None
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"num_layers": sum(layers) * chunks}),
            "parallel": parallel,
            "train": recipe.train.model_copy(update={"recompute_layers": kept}),
        }
    )
