"""Rules for how a run gets its data."""

from __future__ import annotations

from collections.abc import Iterator

from bd3_scale.recipe.schema import DataRecipe, Deadlines, Recipe


def data_problems(recipe: Recipe) -> Iterator[str]:
    """Yield what is wrong with a recipe's data, whatever they hold."""
    data = recipe.data
    if data.cache_limit is not None and data.remote is None:
        yield (
            f"data.cache_limit={data.cache_limit} bounds the cache of a remote, and data.remote is not set: "
            "set data.remote, or leave data.cache_limit out"
        )
    if problem := deadline_problem(data, recipe.launch.deadlines, "launch.deadlines"):
        yield problem


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
