"""Register the rules of `train.profile`, `evaluation.prompts` and `logging.loggers`."""

from __future__ import annotations

from collections.abc import Iterator

from bd3_scale.recipe.rules import rule
from bd3_scale.recipe.schema import Recipe
from bd3_scale.registry import objectives

# Loggers of the package, which have keys of their own.
_OWN_LOGGERS = ("wandb", "tensorboard")


@rule("train.profile.steps", "train.profile.ranks", "train.steps")
def _profile_is_in_the_run(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that the steps and ranks of the profile are in the run."""
    if (profile := recipe.train.profile) is None:
        return
    first, last = profile.steps
    if not first <= last <= recipe.train.steps:
        yield (
            f"train.profile.steps={list(profile.steps)} is no range of the steps 1 to {recipe.train.steps}: give the "
            "first and the last step of the profile"
        )
    if missing := [rank for rank in profile.ranks if rank >= world_size]:
        yield f"train.profile.ranks={list(profile.ranks)}: {missing} are no ranks, the run has 0 to {world_size - 1}"


@rule(
    "evaluation.prompts",
    "diffusion.objective",
    *(f"parallel.{key}" for key in ("pipeline", "virtual_pipeline", "sequence", "expert", "zero_stage")),
)
def _prompts_can_be_continued(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that the model of a run with prompts fills masks, and that its layout can decode."""
    if not recipe.evaluation.prompts:
        return
    parallel = recipe.parallel
    later = "leave evaluation.prompts out, and write texts from checkpoints with `bd3-scale generate RUN --prompt …`"
    if not objectives.get(recipe.diffusion.objective).fills_masks:
        yield f"evaluation.prompts need a model that fills masks, and {recipe.diffusion.objective} trains none: {later}"
    # Decoding runs all layers in this process, on whole rows, with weights that stay in memory. Divided experts need
    # every rank of their group in each pass, and the number of passes depends on what a rank draws.
    for key, value, most in (
        ("pipeline", parallel.pipeline, 1),
        ("virtual_pipeline", parallel.virtual_pipeline, 1),
        ("sequence", parallel.sequence, False),
        ("expert", parallel.expert, 1),
        ("zero_stage", parallel.zero_stage, 2),
    ):
        if value > most:
            limit = f"parallel.{key}={str(most).lower()}" if most is False else f"parallel.{key} up to {most}"
            yield f"evaluation.prompts need {limit}, and it is {str(value).lower()}: {later}"


@rule("logging.loggers")
def _own_loggers_have_keys(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that the loggers of the package are turned on by their own keys."""
    for name in recipe.logging.loggers:
        if name in _OWN_LOGGERS:
            yield f"logging.loggers={name}: this logger has a key of its own: set logging.{name}"
