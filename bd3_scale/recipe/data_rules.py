"""Check where a run reads its data, and how it mixes them."""

from __future__ import annotations

from collections.abc import Iterator

from bd3_scale.recipe.rules import rule
from bd3_scale.recipe.schema import DataRecipe, Deadlines, Recipe


@rule("data.path", "data.remote", "data.sources")
def _data_have_a_place(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that data.path (and remote), or data.sources, say where the data are, and not both."""
    data = recipe.data
    if not data.path and not data.sources:
        yield "data.path: is missing and has no default; for several data sets give data.sources"
    if data.sources and (data.path or data.remote):
        yield "data.path and data.remote are of one data set, and data.sources have their own: leave them out"


@rule("data.cache_limit", "data.remote", "data.sources")
def _cache_has_a_remote(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that cache_limit is set only with a remote."""
    if recipe.data.cache_limit is not None and not recipe.data.remotes:
        yield (
            f"data.cache_limit={recipe.data.cache_limit} bounds the cache of a remote, and data.remote is not set: "
            "set data.remote, or leave data.cache_limit out"
        )


@rule("launch.deadlines.data", "data.retry_minutes")
def _deadline_outlasts_retries(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that launch.deadlines.data is longer than a remote is asked again."""
    if problem := deadline_problem(recipe.data, recipe.launch.deadlines, "launch.deadlines"):
        yield problem


def deadline_problem(data: DataRecipe, deadlines: Deadlines, where: str) -> str | None:
    """Return why a wait for data would count as a hang, or None. where: the section's name in the message."""
    seconds = 60 * data.retry_minutes
    if deadlines.data is None or deadlines.data > seconds:
        return None
    return (
        f"{where}.data={deadlines.data:g} ends a rank that waits while a remote is asked again for "
        f"data.retry_minutes={data.retry_minutes:g} ({seconds:g} s): take more than that, or leave it out for 15 "
        "minutes more"
    )


@rule("data.sources", "data.stages")
def _sources_are_named_and_weighted(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that sources have different names, and weights in exactly one place: each source, or data.stages."""
    data = recipe.data
    names = [source.name for source in data.sources]
    if len(set(names)) < len(names):
        yield f"data.sources: {', '.join(names)} has one name twice: rename one"
    weighted = [source.name for source in data.sources if source.weight is not None]
    if data.stages and weighted:
        yield f"data.sources: {', '.join(weighted)} has a weight beside those of data.stages: leave it out"
    if not data.stages and len(weighted) < len(names):
        without = [source.name for source in data.sources if source.weight is None]
        yield f"data.sources: {', '.join(without)} has no weight: give each one, or data.stages"


@rule("data.stages", "data.sources")
def _stages_follow_each_other(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check that each stage ends later than the one before, the last has no end, and their sources exist."""
    data = recipe.data
    if not data.stages:
        return
    names = [source.name for source in data.sources]
    ends = [stage.until for stage in data.stages]
    rising = [end for end in ends[:-1] if end is not None]
    if ends[-1] is not None or len(rising) < len(ends) - 1 or rising != sorted(set(rising)):
        shown = ", ".join("none" if end is None else str(end) for end in ends)
        yield f"data.stages: `until` is {shown}: each ends later than the one before, and the last one has none"
    for number, stage in enumerate(data.stages):
        if not stage.weights:
            yield f"data.stages.{number}.weights: is empty: name a source"
        for name in stage.weights.keys() - set(names):
            yield f"data.stages.{number}.weights.{name}: is no source; they are {', '.join(names) or 'none'}"
