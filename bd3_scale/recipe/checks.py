"""Rules that join several keys of a recipe, and the counts that follow from it and the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

from bd3_scale.recipe.schema import DiffusionRecipe, ModelRecipe, OptimizerRecipe, Recipe, RecipeError
from bd3_scale.recipe.vocabulary import PADDING_MULTIPLE


def world_size_for_launch(recipe: Recipe) -> int:
    """Processes to start on this machine: `launch.processes`, else one a GPU, else `parallel.tensor`."""
    if recipe.launch.processes is not None:
        return recipe.launch.processes
    import torch

    return torch.cuda.device_count() or recipe.parallel.tensor


def data_parallel_size(recipe: Recipe, world_size: int) -> int:
    """Ranks that read different sequences."""
    return world_size // recipe.parallel.tensor


def check_recipe(recipe: Recipe, world_size: int, document_multiple: int | None = None) -> None:
    """Checks the rules that join several keys.

    Args:
        world_size: ranks of the run, on all nodes.
        document_multiple: tokens to a multiple of which the prepared documents were padded (from the data's manifest);
            None where the data has not been opened yet.

    Raises:
        RecipeError: all broken rules, each with its values and what to change.
    """
    problems = [
        *_model_problems(recipe.model),
        *_tensor_parallel_problems(recipe.model, recipe.parallel.tensor),
        *_batch_problems(recipe, world_size),
        *_diffusion_problems(recipe.diffusion),
        *_block_size_problems(recipe, document_multiple),
        *_schedule_problems(recipe.optimizer, recipe.train.steps),
    ]
    if recipe.data.cache_limit is not None and recipe.data.remote is None:
        problems.append(
            f"data.cache_limit={recipe.data.cache_limit} bounds the cache of a remote, and data.remote is not set: "
            "set data.remote, or leave data.cache_limit out"
        )
    if problems:
        raise RecipeError(problems)


def _model_problems(model: ModelRecipe) -> Iterator[str]:
    heads = model.num_attention_heads
    if heads % model.query_groups:
        yield (
            f"model.num_attention_heads={heads} does not divide into model.num_query_groups={model.query_groups}: "
            f"take num_query_groups {_nearest_divisors(heads, model.query_groups)}"
        )
    if model.head_dim is None and model.hidden_size % heads:
        yield (
            f"model.hidden_size={model.hidden_size} does not divide into model.num_attention_heads={heads}: "
            f"set model.head_dim, or take hidden_size {_nearest_multiples(model.hidden_size, heads)}"
        )
    elif model.head_size % 2:
        yield (
            f"a head has {model.head_size} channels, and rotary embeddings turn pairs of them: "
            f"set model.head_dim to {_nearest_multiples(model.head_size, 2)}"
        )
    if model.norm_bias and model.normalization == "rmsnorm":
        yield "model.norm_bias=true, but rmsnorm has none: set model.norm_bias=false or model.normalization=layernorm"


def _tensor_parallel_problems(model: ModelRecipe, tensor: int) -> Iterator[str]:
    for name, value in (
        ("num_attention_heads", model.num_attention_heads),
        ("num_query_groups", model.query_groups),
        ("ffn_hidden_size", model.ffn_hidden_size),
    ):
        if value % tensor:
            yield (
                f"model.{name}={value} does not divide into parallel.tensor={tensor}: "
                f"take tensor {_nearest_divisors(value, tensor)}, or {name} {_nearest_multiples(value, tensor)}"
            )
    if PADDING_MULTIPLE % tensor:
        yield (
            f"the vocabulary is padded to a multiple of {PADDING_MULTIPLE}, and tensor={tensor} does not divide "
            f"that: take parallel.tensor {_nearest_divisors(PADDING_MULTIPLE, tensor)}"
        )


def _batch_problems(recipe: Recipe, world_size: int) -> Iterator[str]:
    tensor = recipe.parallel.tensor
    if world_size % tensor:
        yield (
            f"{world_size} processes do not divide into parallel.tensor={tensor}: "
            f"start {_nearest_multiples(world_size, tensor)} processes (launch.processes on one machine)"
        )
        return
    batch, micro, data_parallel = (
        recipe.train.global_batch_size,
        recipe.train.micro_batch_size,
        data_parallel_size(recipe, world_size),
    )
    if batch % (micro * data_parallel):
        yield (
            f"train.global_batch_size={batch} does not divide into train.micro_batch_size={micro} x {data_parallel} "
            f"data-parallel ranks: take a global batch of {_nearest_multiples(batch, micro * data_parallel)}"
        )


def _diffusion_problems(diffusion: DiffusionRecipe) -> Iterator[str]:
    low, high = diffusion.mask_rate_low, diffusion.mask_rate_high
    interval = f"diffusion.mask_rate_low={low} and diffusion.mask_rate_high={high}"
    if low > high:
        yield f"{interval} are the wrong way round: swap them"
    elif low == high and (low < 1 or diffusion.block_size > 1):
        yield (
            f"{interval} with block_size={diffusion.block_size} train at a single mask rate, which is exact only for "
            "blocks of one token at rate 1: widen the interval, such as 0 to 1"
        )


def _block_size_problems(recipe: Recipe, document_multiple: int | None) -> Iterator[str]:
    block, length = recipe.diffusion.block_size, recipe.data.seq_len
    if length % block:
        yield (
            f"data.seq_len={length} does not divide into blocks of diffusion.block_size={block}: "
            f"take block_size {_nearest_divisors(length, block)}"
        )
    elif recipe.data.isolate_documents and document_multiple is not None and document_multiple % block:
        yield (
            f"diffusion.block_size={block} does not divide document_multiple={document_multiple}, to which the data's "
            f"documents are padded: take block_size {_nearest_divisors(document_multiple, block)}, prepare the data "
            f"with --document-multiple {block}, or set data.isolate_documents=false"
        )


def _schedule_problems(optimizer: OptimizerRecipe, steps: int) -> Iterator[str]:
    decay = optimizer.decay_steps
    if optimizer.warmup_steps > steps:
        yield f"optimizer.warmup_steps={optimizer.warmup_steps} exceeds train.steps={steps}: lower it or train longer"
    if decay is not None and optimizer.schedule != "wsd":
        yield (
            f"optimizer.decay_steps={decay} belongs to the wsd schedule, not {optimizer.schedule}: "
            "set optimizer.schedule=wsd, or leave decay_steps out"
        )
    elif decay is not None and optimizer.warmup_steps + decay > steps:
        yield (
            f"optimizer.warmup_steps={optimizer.warmup_steps} and decay_steps={decay} together exceed "
            f"train.steps={steps}: lower them or train longer"
        )


def _nearest_multiples(value: int, factor: int) -> str:
    below = value // factor * factor
    return f"{below} or {below + factor}" if below else str(factor)


def _nearest_divisors(value: int, near: int) -> str:
    divisors = [d for d in range(1, value + 1) if value % d == 0]
    return " or ".join(map(str, [d for d in divisors if d <= near][-1:] + [d for d in divisors if d > near][:1]))
