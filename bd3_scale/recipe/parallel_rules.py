"""Check the layout: pipeline chunks, divided sequences, batches over data-parallel ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator

from bd3_scale.recipe.rules import nearest_multiples, rule
from bd3_scale.recipe.schema import Recipe


def data_parallel_size(recipe: Recipe, world_size: int) -> int:
    """Return the number of ranks that read different sequences."""
    return world_size // recipe.parallel.model_size


@rule("parallel.virtual_pipeline", "parallel.pipeline")
def _interleaving_needs_stages(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that virtual_pipeline is above 1 only with several pipeline stages."""
    parallel = recipe.parallel
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        yield (
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} interleaves the chunks of several stages, and "
            "parallel.pipeline is 1: set parallel.virtual_pipeline=1, or pipeline 2 or more"
        )


@rule("model.num_layers", "parallel.pipeline", "parallel.virtual_pipeline", "parallel.layers_per_chunk")
def _every_chunk_has_layers(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that each of the pipeline x virtual_pipeline chunks has a layer, and layers_per_chunk adds up."""
    parallel, layers = recipe.parallel, recipe.model.num_layers
    count = parallel.pipeline * parallel.virtual_pipeline
    chunks = f"parallel.pipeline={parallel.pipeline} x virtual_pipeline={parallel.virtual_pipeline}"
    if layers < count:
        yield (
            f"model.num_layers={layers} are fewer than {chunks} = {count} chunks, of which each needs a layer: "
            f"lower pipeline or virtual_pipeline, or take num_layers {count}"
        )
    given = parallel.layers_per_chunk
    if given is not None and (len(given) != count or sum(given) != layers):
        yield (
            f"parallel.layers_per_chunk={list(given)} are {len(given)} chunks of {sum(given)} layers, and {chunks} "
            f"need {count} chunks of model.num_layers={layers}: correct it, or leave it out"
        )


@rule("parallel.zero_stage", "parallel.pipeline")
def _zero_3_needs_one_stage(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that zero_stage 3 is not used with a pipeline."""
    if recipe.parallel.zero_stage == 3 and recipe.parallel.pipeline > 1:
        yield (
            f"parallel.zero_stage=3 with pipeline={recipe.parallel.pipeline} deadlocks: each stage would gather its "
            "weights at moments of its own schedule; take zero_stage 1, or pipeline 1"
        )


@rule(
    "train.recompute_layers",
    "train.recompute",
    "model.num_layers",
    "parallel.pipeline",
    "parallel.virtual_pipeline",
    "parallel.layers_per_chunk",
)
def _recomputed_layers_exist(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that recompute_layers belongs to recompute: full, and is at most the layers of a pipeline chunk."""
    number, parallel, layers = recipe.train.recompute_layers, recipe.parallel, recipe.model.num_layers
    if number is None:
        return
    if recipe.train.recompute != "full":
        yield (
            f"train.recompute_layers={number} counts layers to recompute whole, and "
            f"train.recompute is {recipe.train.recompute}: set train.recompute=full, or leave recompute_layers out"
        )
    # With fewer layers than chunks, another rule is broken, and chunks would be empty.
    elif layers >= parallel.pipeline * parallel.virtual_pipeline and number > (most := max(parallel.chunks(layers))):
        yield (
            f"train.recompute_layers={number} are more than the {most} layers of a pipeline "
            "chunk: lower it, or leave it out to recompute all"
        )


@rule("parallel.sequence", "parallel.tensor")
def _sequence_needs_tensor_ranks(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that sequence parallelism has several tensor-parallel ranks."""
    if recipe.parallel.sequence and recipe.parallel.tensor == 1:
        yield (
            "parallel.sequence=true splits rows over tensor-parallel ranks, and parallel.tensor is 1: "
            "set parallel.sequence=false, or tensor 2 or more"
        )


@rule(
    "data.seq_len",
    "diffusion.block_size",
    "diffusion.block_size_schedule",
    "diffusion.block_size_choices",
    "parallel.context",
    "parallel.sequence",
    "parallel.tensor",
)
def _ranks_divide_a_sequence(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that seq_len divides into whole blocks over context-parallel ranks, and into rows over sequence ranks."""
    for block in recipe.diffusion.block_sizes:
        yield from _sequence_problems(recipe, block)


def _sequence_problems(recipe: Recipe, block: int) -> Iterator[str]:
    parallel, length = recipe.parallel, recipe.data.seq_len
    # A sequence that is one block has no clean copy (MDLM). Where each sequence draws its block size, other sequences
    # of the batch have one, and noisy keys are not gathered.
    mdlm = block >= length and block not in recipe.diffusion.block_size_choices
    # A context rank holds two ranges of positions, an early and a late one, which balances causal work. Noisy keys stay
    # on their rank, so that no block may be cut.
    of_ranges = 2 * parallel.context * (1 if mdlm else block) if parallel.context > 1 else 1
    of_rows = parallel.context * parallel.tensor if parallel.sequence else 1
    suited = nearest_multiples(length, math.lcm(of_ranges, of_rows, 1 if mdlm else block))
    way_out = f"take seq_len{' and block_size' if mdlm else ''} {suited}"
    if length % of_ranges:
        of_blocks = "" if mdlm else f" of diffusion.block_size={block}"
        yield (
            f"data.seq_len={length} does not divide into 2 ranges of whole blocks{of_blocks} for each of "
            f"parallel.context={parallel.context} ranks: {way_out}"
        )
    elif length % of_rows:
        yield (
            f"parallel.sequence=true gives each of parallel.tensor={parallel.tensor} ranks as many positions, and "
            f"data.seq_len={length} / context={parallel.context} does not divide: {way_out}"
        )


@rule(
    "launch.processes",
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.virtual_pipeline",
    "parallel.context",
    "train.global_batch_size",
    "train.micro_batch_size",
)
def batches_divide(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that replicas divide the ranks, and whole micro-batches on every replica make up the global batch."""
    parallel = recipe.parallel
    if world_size % parallel.model_size:
        factors = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "context": parallel.context}
        layout = " x ".join(f"{name}={size}" for name, size in factors.items() if size > 1)
        yield (
            f"{world_size} processes do not divide into parallel.{layout}: "
            f"start {nearest_multiples(world_size, parallel.model_size)} processes (launch.processes on one machine)"
        )
        return
    batch, micro, data_parallel = (
        recipe.train.global_batch_size,
        recipe.train.micro_batch_size,
        data_parallel_size(recipe, world_size),
    )
    # The interleaved schedule takes micro-batches in groups of as many as there are stages.
    suited = nearest_multiples(
        batch, micro * data_parallel * (parallel.pipeline if parallel.virtual_pipeline > 1 else 1)
    )
    if batch % (micro * data_parallel):
        yield (
            f"train.global_batch_size={batch} does not divide into train.micro_batch_size={micro} x {data_parallel} "
            f"data-parallel ranks: take a global batch of {suited}"
        )
    elif parallel.virtual_pipeline > 1 and batch // (micro * data_parallel) % parallel.pipeline:
        yield (
            f"the interleaved schedule takes micro-batches in groups of parallel.pipeline={parallel.pipeline}, and a "
            f"rank has {batch // (micro * data_parallel)}: take a global batch of {suited}"
        )
