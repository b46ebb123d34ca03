"""Check the objective: block sizes, the noise schedule and the interval of mask rates."""

from __future__ import annotations

from collections.abc import Iterator

from bd3_scale.recipe.rules import DATA_RULES, nearest_divisors, rule
from bd3_scale.recipe.schema import DataRecipe, Recipe, RecipeError
from bd3_scale.registry import objectives, schedules

# Above this, the weights of a step, which are differences of float32 rates, are off by more than a percent.
MOST_NOISE_STEPS = 100_000


@rule("diffusion.block_size", "diffusion.block_size_schedule", "diffusion.block_size_choices", "data.seq_len")
def _blocks_divide_a_sequence(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that every block size divides data.seq_len."""
    for block in recipe.diffusion.block_sizes:
        yield from _length_problems(block, recipe.data)


@rule(
    "diffusion.block_size",
    "diffusion.block_size_schedule",
    "diffusion.block_size_choices",
    "data.seq_len",
    "data.isolate_documents",
    of=DATA_RULES,
)
def _blocks_divide_documents(recipe: Recipe, document_multiple: int) -> Iterator[str]:
    """Check that every block size divides the length that documents were padded to, where they are isolated."""
    for block in recipe.diffusion.block_sizes:
        yield from _document_problems(block, recipe.data, document_multiple)


def check_block_size(block: int, data: DataRecipe, document_multiple: int) -> None:
    """Check a block size that the recipe does not have, such as one of an evaluation.

    RecipeError: blocks of so many tokens do not fit into the sequences or the documents of `data`.
    """
    if problems := [*_length_problems(block, data), *_document_problems(block, data, document_multiple)]:
        raise RecipeError(problems)


def _length_problems(block: int, data: DataRecipe) -> Iterator[str]:
    if data.seq_len % block:
        yield (
            f"data.seq_len={data.seq_len} does not divide into blocks of diffusion.block_size={block}: "
            f"take block_size {nearest_divisors(data.seq_len, block)}"
        )


def _document_problems(block: int, data: DataRecipe, document_multiple: int) -> Iterator[str]:
    if data.seq_len % block == 0 and data.isolate_documents and document_multiple % block:
        yield (
            f"diffusion.block_size={block} does not divide document_multiple={document_multiple}, to which the data's "
            f"documents are padded: take block_size {nearest_divisors(document_multiple, block)}, prepare the data "
            f"with --document-multiple {block}, or set data.isolate_documents=false"
        )


@rule("diffusion.block_size_schedule", "diffusion.block_size", "train.steps")
def _schedule_leaves_steps(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that block_size_schedule leaves steps for block_size."""
    steps = sum(phase.steps for phase in recipe.diffusion.block_size_schedule)
    if steps and steps >= recipe.train.steps:
        yield (
            f"diffusion.block_size_schedule takes {steps} steps of train.steps={recipe.train.steps}, and none would be "
            f"left for diffusion.block_size={recipe.diffusion.block_size}: shorten it or train longer"
        )


@rule("diffusion.block_size_choices")
def _choices_differ(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that block_size_choices has each block size once."""
    choices = recipe.diffusion.block_size_choices
    if len(set(choices)) < len(choices):
        yield f"diffusion.block_size_choices={list(choices)} has one twice: name each once"


@rule("diffusion.mask_noise_std", "diffusion.mask_noise_steps")
def _mask_noise_has_both(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that mask_noise_std and mask_noise_steps are both set, or neither."""
    diffusion = recipe.diffusion
    if bool(diffusion.mask_noise_std) != bool(diffusion.mask_noise_steps):
        yield (
            f"diffusion.mask_noise_std={diffusion.mask_noise_std} and mask_noise_steps={diffusion.mask_noise_steps} "
            "belong together: set both, or neither"
        )


@rule(
    "diffusion.noisy_copies",
    "diffusion.block_size",
    "diffusion.block_size_schedule",
    "diffusion.block_size_choices",
    "data.seq_len",
)
def _copies_share_a_clean_one(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that two noisy copies have a clean copy to share: blocks are shorter than the sequence."""
    for block in recipe.diffusion.block_sizes:
        if recipe.diffusion.noisy_copies > 1 and block >= recipe.data.seq_len:
            yield (
                f"diffusion.noisy_copies={recipe.diffusion.noisy_copies} share one clean stream, and block_size="
                f"{block} of seq_len={recipe.data.seq_len} has none: set diffusion.noisy_copies=1"
            )


@rule(
    "diffusion.noisy_copies",
    "diffusion.mask_rate_low",
    "diffusion.mask_rate_high",
    "diffusion.search_interval",
    "diffusion.block_size",
    "diffusion.block_size_schedule",
    "diffusion.block_size_choices",
)
def _copies_differ(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that two noisy copies differ: the mask rate is not always 1."""
    diffusion = recipe.diffusion
    if diffusion.noisy_copies > 1 and diffusion.mask_rate_low == diffusion.mask_rate_high == 1:
        yield (
            f"diffusion.noisy_copies={diffusion.noisy_copies} at mask rate 1 are equal, with every token masked: "
            "set diffusion.noisy_copies=1"
        )
    if diffusion.search_interval and diffusion.noisy_copies > 1 and 1 in diffusion.block_sizes:
        yield (
            f"diffusion.search_interval finds mask rate 1 for blocks of one token, where diffusion.noisy_copies="
            f"{diffusion.noisy_copies} are equal: set diffusion.noisy_copies=1"
        )


@rule(
    "diffusion.mask_rate_low",
    "diffusion.mask_rate_high",
    "diffusion.block_size",
    "diffusion.block_size_schedule",
    "diffusion.block_size_choices",
)
def _interval_is_open(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that mask_rate_low is below mask_rate_high; both may be 1 for blocks of one token."""
    low, high = recipe.diffusion.mask_rate_low, recipe.diffusion.mask_rate_high
    if low > high:
        yield f"diffusion.mask_rate_low={low} and diffusion.mask_rate_high={high} are the wrong way round: swap them"
    # At a single rate below 1 the loss is no bound of the likelihood. At rate 1 a block of one token is always masked,
    # which is the autoregressive likelihood.
    for block in recipe.diffusion.block_sizes:
        if low == high and (low < 1 or block > 1):
            yield (
                f"diffusion.mask_rate_low={low} and diffusion.mask_rate_high={high} with block_size={block} train at a "
                "single mask rate, which is exact only for blocks of one token at rate 1: widen the interval, such as "
                "0 to 1"
            )


@rule(
    "diffusion.mask_rate_low",
    "diffusion.mask_rate_high",
    "diffusion.search_interval",
    "diffusion.noise_schedule",
    "diffusion.noise_steps",
)
def _schedule_can_be_clipped(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that an interval other than 0 to 1 clips a schedule that allows it, such as linear, in continuous time."""
    diffusion = recipe.diffusion
    low, high = diffusion.mask_rate_low, diffusion.mask_rate_high
    if (low, high) == (0, 1) and not diffusion.search_interval:
        return
    if diffusion.noise_steps is not None or not schedules.get(diffusion.noise_schedule).clips:
        yield (
            f"diffusion.mask_rate_low={low} and diffusion.mask_rate_high={high} clip a schedule that allows it, such "
            f"as linear, in continuous time, and noise_schedule={diffusion.noise_schedule} with noise_steps="
            f"{diffusion.noise_steps} is another: leave the interval at 0 to 1 and search_interval out, or "
            "noise_schedule and noise_steps"
        )


@rule("diffusion.noise_schedule")
def _curve_is_sound(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that the noise schedule is a curve from 0 to 1 that grows."""
    name = recipe.diffusion.noise_schedule
    if problem := schedules.get(name)().problem():
        yield f"diffusion.noise_schedule={name}: {problem}; correct the schedule"


@rule("diffusion.noise_steps")
def _float32_resolves_steps(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that noise_steps are few enough for float32 to resolve their rates."""
    if (recipe.diffusion.noise_steps or 1) > MOST_NOISE_STEPS:
        yield (
            f"diffusion.noise_steps={recipe.diffusion.noise_steps} are steps of a rate that float32 does not resolve: "
            f"take at most {MOST_NOISE_STEPS}, or leave it out for continuous time"
        )


@rule("diffusion.search_interval", "evaluation.every_steps")
def _search_has_evaluations(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that search_interval has evaluations during training to search at."""
    if recipe.diffusion.search_interval and not recipe.evaluation.every_steps:
        yield "diffusion.search_interval searches at every evaluation, and evaluation.every_steps=0: set it"


@rule("diffusion.search_interval", "diffusion.clip_masked_share", "diffusion.loss_weights")
def _search_is_of_the_plain_loss(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that search_interval is not combined with clip_masked_share or other loss_weights than nelbo."""
    diffusion = recipe.diffusion
    if diffusion.search_interval and (diffusion.clip_masked_share or diffusion.loss_weights != "nelbo"):
        yield (
            "diffusion.search_interval searches for the plain loss: leave clip_masked_share and loss_weights out, or it"
        )


@rule("diffusion.clip_masked_share", "diffusion.mask_rate_low", "diffusion.mask_rate_high")
def _clipped_share_has_an_interval(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that clip_masked_share has an interval narrower than 0 to 1."""
    diffusion = recipe.diffusion
    if diffusion.clip_masked_share and (diffusion.mask_rate_low, diffusion.mask_rate_high) == (0, 1):
        yield (
            "diffusion.clip_masked_share keeps shares inside diffusion.mask_rate_low=0.0 to mask_rate_high=1.0, which "
            "all are: narrow the interval, or leave it out"
        )


@rule("diffusion.loss_weights", "diffusion.mask_rate_low")
def _unit_weights_change_something(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that loss_weights: unit_when_heavy has a mask_rate_low above 0.5, without which it changes nothing."""
    low = recipe.diffusion.mask_rate_low
    if recipe.diffusion.loss_weights == "unit_when_heavy" and low <= 0.5:
        yield (
            f"diffusion.loss_weights=unit_when_heavy changes nothing at diffusion.mask_rate_low={low}: raise it above "
            "0.5, or leave loss_weights out"
        )


@rule(
    "diffusion.objective",
    "diffusion.objective_options",
    "diffusion.block_size",
    "diffusion.mask_rate_low",
    "diffusion.mask_rate_high",
)
def _objective_suits(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that the objective takes these options and values; next_token, for example, needs block_size 1."""
    yield from objectives.get(recipe.diffusion.objective).problems(recipe)
