"""Rules for how a run gets its data."""

from __future__ import annotations

from collections.abc import Iterator

from bd3_scale.recipe.schema import DataRecipe, Deadlines, Recipe


def data_problems(recipe: Recipe) -> Iterator[str]:
    """Yield what is wrong with a recipe's data, whatever they hold."""
    data = recipe.data
    if data.cache_limit is not None and not data.remotes:
        yield (
            f"data.cache_limit={data.cache_limit} bounds the cache of a remote, and data.remote is not set: "
            "set data.remote, or leave data.cache_limit out"
        )
    if problem := deadline_problem(data, recipe.launch.deadlines, "launch.deadlines"):
        yield problem
    if not data.path and not data.sources:
        yield "data.path: is missing and has no default; for several data sets give data.sources"
    if data.sources and (data.path or data.remote):
        yield "data.path and data.remote are of one data set, and data.sources have their own: leave them out"
    names = [source.name for source in data.sources]
    if len(set(names)) < len(names):
        yield f"data.sources: {', '.join(names)} has one name twice: rename one"
    if data.stages:
        yield from _stage_problems(data, names)
    elif without := [source.name for source in data.sources if source.weight is None]:
        yield f"data.sources: {', '.join(without)} has no weight: give each one, or data.stages"


def _stage_problems(data: DataRecipe, names: list[str]) -> Iterator[str]:
    if weighted := [source.name for source in data.sources if source.weight is not None]:
        yield f"data.sources: {', '.join(weighted)} has a weight beside those of data.stages: leave it out"
    ends = [stage.until for stage in data.stages]
    rising = [end for end in ends[:-1] if end is not None]
    if ends[-1] is not None or len(rising) < len(ends) - 1 or rising != sorted(set(rising)):
        told = ", ".join("none" if end is None else str(end) for end in ends)
        yield f"data.stages: `until` is {told}: each ends later than the one before, and the last one has none"
    for number, stage in enumerate(data.stages):
        if not stage.weights:
            yield f"data.stages.{number}.weights: is empty: name a source"
        for name in stage.weights.keys() - set(names):
            yield f"data.stages.{number}.weights.{name}: is no source; they are {', '.join(names) or 'none'}"


def deadline_problem(data: DataRecipe, deadlines: Deadlines, where: str) -> str | None:
    """Return why a wait for data would be taken for a hang, or None. where: what `deadlines` are called."""
    seconds = 60 * data.retry_minutes
    if deadlines.data is None or deadlines.data > seconds:
        return None
    return (
        f"{where}.data={deadlines.data:g} ends a rank that waits while a remote is asked again for "
        f"data.retry_minutes={data.retry_minutes:g} ({seconds:g} s): take more than that, or leave it out for 15 "
        "minutes more"
    )
