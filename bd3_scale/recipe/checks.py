"""Rules that join several keys of a recipe, and the counts that follow from it and the number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.metadata import version
from operator import attrgetter
from typing import Any

from bd3_scale.recipe.data_checks import data_problems
from bd3_scale.recipe.moe_checks import moe_problems
from bd3_scale.recipe.schema import DataRecipe, ModelRecipe, OptimizerRecipe, Recipe, RecipeError
from bd3_scale.recipe.vocabulary import PADDING_MULTIPLE
from bd3_scale.registry import Registry, attention_backends, objectives, optimizers, schedules

# Above, the weights of a step, differences of float32 rates, are off by more than a percent.
MOST_NOISE_STEPS = 100_000
# What a recipe names by its key, who knows such names, and what else may stand there.
_NAMES: tuple[tuple[str, Registry[Any], str], ...] = (
    ("diffusion.objective", objectives, ""),
    ("diffusion.noise_schedule", schedules, ""),
    ("attention_backend", attention_backends, "auto"),
    ("optimizer.family", optimizers, ""),
)


def world_size_for_launch(recipe: Recipe) -> int:
    """Processes to start on this machine: `launch.processes`, else one a GPU, else the fewest the layout needs."""
    if recipe.launch.processes is not None:
        return recipe.launch.processes
    return _gpus() or recipe.parallel.fewest_ranks


def _gpus() -> int:
    """GPUs of this machine. A build of PyTorch for CPUs sees none, and importing it would take a second."""
    if version("torch").endswith("+cpu"):
        return 0
    import torch

    return torch.cuda.device_count()


def data_parallel_size(recipe: Recipe, world_size: int) -> int:
    """Ranks that read different sequences."""
    return world_size // recipe.parallel.model_size


def check_recipe(recipe: Recipe, world_size: int) -> None:
    """Check the names of a recipe and the rules that join several of its keys, before its data are opened.

    Its plug-ins are imported before. world_size: ranks of the run, on all nodes.

    Raises:
        RecipeError: all unknown names and broken rules, each with its values and what to change.
    """
    # The rules ask what has these names.
    if problems := list(_name_problems(recipe)):
        raise RecipeError(problems)
    problems = [
        *_model_problems(recipe.model),
        *moe_problems(recipe, world_size),
        *_tensor_parallel_problems(recipe.model, recipe.parallel.tensor),
        *_pipeline_problems(recipe),
        *_batch_problems(recipe, world_size),
        *_curve_problems(recipe.diffusion.noise_schedule),
        *_interval_problems(recipe),
        *_block_size_schedule_problems(recipe),
        *_schedule_problems(recipe.optimizer, recipe.train.steps),
        *_family_problems(recipe.optimizer),
        *_retention_problems(recipe),
        *objectives.get(recipe.diffusion.objective).problems(recipe),
    ]
    # Each problem once, however many block sizes have it.
    problems += dict.fromkeys(
        problem
        for block_size in recipe.diffusion.block_sizes
        for problem in (
            *_sequence_problems(recipe, block_size),
            *_noise_problems(recipe, block_size),
            *_block_size_problems(block_size, recipe.data, None),
        )
    )
    problems += data_problems(recipe)
    if problems:
        raise RecipeError(problems)


def check_against_data(recipe: Recipe, world_size: int, document_multiple: int) -> None:
    """Check what a recipe that `check_recipe` has passed still depends on, where ranks have met over their data.

    document_multiple: tokens to a multiple of which the prepared documents were padded (from the data's manifest).
    RecipeError as there.
    """
    problems = list(_batch_problems(recipe, world_size))
    for block_size in recipe.diffusion.block_sizes:
        problems += _block_size_problems(block_size, recipe.data, document_multiple)
    if problems:
        raise RecipeError(problems)


def _name_problems(recipe: Recipe) -> Iterator[str]:
    for key, registry, besides in _NAMES:
        name = attrgetter(key)(recipe)
        if name == besides:
            continue
        try:
            registry.get(name)
        except ValueError as error:
            yield f"{key}={name}: {error}"


def _retention_problems(recipe: Recipe) -> Iterator[str]:
    saves, evaluates = recipe.checkpoint.every_steps, recipe.evaluation.every_steps
    if recipe.checkpoint.keep_best and not (saves and evaluates and math.lcm(saves, evaluates) <= recipe.train.steps):
        yield (
            f"checkpoint.keep_best={recipe.checkpoint.keep_best} needs checkpoints that are evaluated, and with "
            f"checkpoint.every_steps={saves} and evaluation.every_steps={evaluates} none is: make one a multiple of "
            "the other"
        )


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
    elif not model.rotary_channels or model.rotary_channels % 2:
        yield (
            f"model.rotary_fraction={model.rotary_fraction} of a head's {model.head_size} channels are "
            f"{model.rotary_channels}, and rotary embeddings turn pairs of them: take a fraction that gives "
            f"{_nearest_multiples(model.rotary_channels, 2)}"
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


def _pipeline_problems(recipe: Recipe) -> Iterator[str]:
    parallel, layers = recipe.parallel, recipe.model.num_layers
    count = parallel.pipeline * parallel.virtual_pipeline
    chunks = f"parallel.pipeline={parallel.pipeline} x virtual_pipeline={parallel.virtual_pipeline}"
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        yield (
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} interleaves the chunks of several stages, and "
            "parallel.pipeline is 1: set parallel.virtual_pipeline=1, or pipeline 2 or more"
        )
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
    if parallel.zero_stage == 3 and parallel.pipeline > 1:
        yield (
            f"parallel.zero_stage=3 with pipeline={parallel.pipeline} deadlocks: each stage would gather its weights "
            "at moments of its own schedule; take zero_stage 1, or pipeline 1"
        )
    if recipe.train.recompute_layers is not None and recipe.train.recompute != "full":
        yield (
            f"train.recompute_layers={recipe.train.recompute_layers} counts layers to recompute whole, and "
            f"train.recompute is {recipe.train.recompute}: set train.recompute=full, or leave recompute_layers out"
        )
    elif recipe.train.recompute_layers is not None and layers >= count:
        most = max(parallel.chunks(layers))
        if recipe.train.recompute_layers > most:
            yield (
                f"train.recompute_layers={recipe.train.recompute_layers} are more than the {most} layers of a pipeline "
                "chunk: lower it, or leave it out to recompute all"
            )


def _sequence_problems(recipe: Recipe, block: int) -> Iterator[str]:
    parallel, length = recipe.parallel, recipe.data.seq_len
    if parallel.sequence and parallel.tensor == 1:
        yield (
            "parallel.sequence=true splits rows over tensor-parallel ranks, and parallel.tensor is 1: "
            "set parallel.sequence=false, or tensor 2 or more"
        )
    # Beside sequences of smaller blocks there are clean rows, and noisy keys are not gathered.
    mdlm = block >= length and block not in recipe.diffusion.block_size_choices
    # A rank holds two ranges, early and late; noisy keys stay with their rank, so that no block may be cut.
    of_ranges = 2 * parallel.context * (1 if mdlm else block) if parallel.context > 1 else 1
    of_rows = parallel.context * parallel.tensor if parallel.sequence else 1
    suited = _nearest_multiples(length, math.lcm(of_ranges, of_rows, 1 if mdlm else block))
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


def _batch_problems(recipe: Recipe, world_size: int) -> Iterator[str]:
    parallel = recipe.parallel
    if world_size % parallel.model_size:
        factors = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "context": parallel.context}
        layout = " x ".join(f"{name}={size}" for name, size in factors.items() if size > 1)
        yield (
            f"{world_size} processes do not divide into parallel.{layout}: "
            f"start {_nearest_multiples(world_size, parallel.model_size)} processes (launch.processes on one machine)"
        )
        return
    batch, micro, data_parallel = (
        recipe.train.global_batch_size,
        recipe.train.micro_batch_size,
        data_parallel_size(recipe, world_size),
    )
    # The interleaved schedule takes micro-batches in groups of as many as there are stages.
    suited = _nearest_multiples(
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


def _block_size_schedule_problems(recipe: Recipe) -> Iterator[str]:
    diffusion = recipe.diffusion
    steps = sum(phase.steps for phase in diffusion.block_size_schedule)
    if steps and steps >= recipe.train.steps:
        yield (
            f"diffusion.block_size_schedule takes {steps} steps of train.steps={recipe.train.steps}, and none would be "
            f"left for diffusion.block_size={diffusion.block_size}: shorten it or train longer"
        )
    if bool(diffusion.mask_noise_std) != bool(diffusion.mask_noise_steps):
        yield (
            f"diffusion.mask_noise_std={diffusion.mask_noise_std} and mask_noise_steps={diffusion.mask_noise_steps} "
            "belong together: set both, or neither"
        )


def _noise_problems(recipe: Recipe, block: int) -> Iterator[str]:
    diffusion = recipe.diffusion
    if diffusion.noisy_copies > 1 and block >= recipe.data.seq_len:
        yield (
            f"diffusion.noisy_copies={diffusion.noisy_copies} share one clean stream, and block_size="
            f"{block} of seq_len={recipe.data.seq_len} has none: set diffusion.noisy_copies=1"
        )
    low, high = diffusion.mask_rate_low, diffusion.mask_rate_high
    if low == high and (low < 1 or block > 1):
        yield (
            f"diffusion.mask_rate_low={low} and diffusion.mask_rate_high={high} with block_size={block} train at a "
            "single mask rate, which is exact only for blocks of one token at rate 1: widen the interval, such as 0 to "
            "1"
        )


def _curve_problems(name: str) -> Iterator[str]:
    if problem := schedules.get(name)().problem():
        yield f"diffusion.noise_schedule={name}: {problem}; correct the schedule"


def _interval_problems(recipe: Recipe) -> Iterator[str]:
    diffusion = recipe.diffusion
    low, high = diffusion.mask_rate_low, diffusion.mask_rate_high
    if diffusion.search_interval and not recipe.evaluation.every_steps:
        yield "diffusion.search_interval searches at every evaluation, and evaluation.every_steps=0: set it"
    if diffusion.noisy_copies > 1 and low == high == 1:
        yield (
            f"diffusion.noisy_copies={diffusion.noisy_copies} at mask rate 1 are equal, with every token masked: "
            "set diffusion.noisy_copies=1"
        )
    if diffusion.search_interval and diffusion.noisy_copies > 1 and 1 in diffusion.block_sizes:
        yield (
            f"diffusion.search_interval finds mask rate 1 for blocks of one token, where diffusion.noisy_copies="
            f"{diffusion.noisy_copies} are equal: set diffusion.noisy_copies=1"
        )
    if diffusion.search_interval and (diffusion.clip_masked_share or diffusion.loss_weights != "nelbo"):
        yield (
            "diffusion.search_interval searches for the plain loss: leave clip_masked_share and loss_weights out, or it"
        )
    if (diffusion.noise_steps or 1) > MOST_NOISE_STEPS:
        yield (
            f"diffusion.noise_steps={diffusion.noise_steps} are steps of a rate that float32 does not resolve: take at "
            f"most {MOST_NOISE_STEPS}, or leave it out for continuous time"
        )
    if diffusion.clip_masked_share and (low, high) == (0, 1):
        yield (
            "diffusion.clip_masked_share keeps shares inside diffusion.mask_rate_low=0.0 to mask_rate_high=1.0, which "
            "all are: narrow the interval, or leave it out"
        )
    if diffusion.loss_weights == "unit_when_heavy" and low <= 0.5:
        yield (
            f"diffusion.loss_weights=unit_when_heavy changes nothing at diffusion.mask_rate_low={low}: raise it above "
            "0.5, or leave loss_weights out"
        )
    if len(set(diffusion.block_size_choices)) < len(diffusion.block_size_choices):
        yield f"diffusion.block_size_choices={list(diffusion.block_size_choices)} has one twice: name each once"
    if low > high:
        yield (f"diffusion.mask_rate_low={low} and diffusion.mask_rate_high={high} are the wrong way round: swap them")
    if (low, high) == (0, 1) and not diffusion.search_interval:
        return
    if diffusion.noise_steps is not None or not schedules.get(diffusion.noise_schedule).clips:
        yield (
            f"diffusion.mask_rate_low={low} and diffusion.mask_rate_high={high} clip a schedule that allows it, such "
            f"as linear, in continuous time, and noise_schedule={diffusion.noise_schedule} with noise_steps="
            f"{diffusion.noise_steps} is another: leave the interval at 0 to 1 and search_interval out, or "
            "noise_schedule and noise_steps"
        )


def check_block_size(block: int, data: DataRecipe, document_multiple: int) -> None:
    """RecipeError: blocks of so many tokens do not fit into the sequences or the documents of `data`."""
    if problems := list(_block_size_problems(block, data, document_multiple)):
        raise RecipeError(problems)


def _block_size_problems(block: int, data: DataRecipe, document_multiple: int | None) -> Iterator[str]:
    length = data.seq_len
    if length % block:
        yield (
            f"data.seq_len={length} does not divide into blocks of diffusion.block_size={block}: "
            f"take block_size {_nearest_divisors(length, block)}"
        )
    elif data.isolate_documents and document_multiple is not None and document_multiple % block:
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


def _family_problems(optimizer: OptimizerRecipe) -> Iterator[str]:
    yield from optimizers.get(optimizer.family)(optimizer).problems()
    for group in optimizer.groups:
        if not group.settings:
            yield f"optimizer.groups: {group.match!r} gives nothing: set lr_scale or weight_decay, or leave it out"


def _nearest_multiples(value: int, factor: int) -> str:
    below = value // factor * factor
    return f"{below} or {below + factor}" if below else str(factor)


def _nearest_divisors(value: int, near: int) -> str:
    divisors = [d for d in range(1, value + 1) if value % d == 0]
    return " or ".join(map(str, [d for d in divisors if d <= near][-1:] + [d for d in divisors if d > near][:1]))
