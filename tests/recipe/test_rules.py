"""Check that each rule names the keys that its check reads, so that `recipe explain` says what the checks do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

import pytest
from pydantic import BaseModel

from bd3_scale.recipe.checks import DATA_RULES, RULES, check_recipe
from bd3_scale.recipe.rules import Rule, rule, rule_text
from bd3_scale.recipe.schema import Recipe, RecipeError, Section
from bd3_scale.recipe.section import dotted_fields, holds_many, nested_section
from tests.recipe import test_checks, test_moe_checks
from tests.recipe.test_checks import recipe

EVERY = [*RULES, *DATA_RULES]
FIELDS = dict(dotted_fields(Recipe))
# The key of each section; no two sections have the same class.
KEY_OF = {nested_section(field.annotation): key for key, field in FIELDS.items() if nested_section(field.annotation)}
MOE = {"num_experts": 8, "top_k": 2, "ffn_hidden_size": 32}

# Recipes that break rules of sections that the other tests' recipe leaves out.
OTHERS: list[dict[str, object]] = [
    {"diffusion__block_size_schedule": [{"block_size": 4, "steps": 20}]},
    {"diffusion__search_interval": True, "diffusion__noisy_copies": 2, "evaluation__every_steps": 5},
    {"diffusion__clip_masked_share": True},
    {"checkpoint__keep_best": 1, "checkpoint__every_steps": 2, "evaluation__every_steps": 2},
    {"data__cache_limit": "1gb", "launch__deadlines": {"data": 1.0}},
    {"diffusion__loss_weights": "unit_when_heavy"},
    {"train__profile": {"steps": [3, 1], "ranks": [0, 1]}},
    {"evaluation__prompts": ["Once"], "parallel__pipeline": 2},
    {"logging__loggers": ["tensorboard"]},
]


@contextmanager
def reads() -> Iterator[set[str]]:
    """Collect the keys of all fields that are read from a recipe; a key in a list counts as the list."""
    keys: set[str] = set()

    def read(self: BaseModel, name: str) -> object:
        section = type(self)
        if name in section.__dict__["__pydantic_fields__"] and (section is Recipe or section in KEY_OF):
            if section is Recipe:
                keys.add(name)
            else:
                many = holds_many(FIELDS[KEY_OF[section]].annotation)
                keys.add(KEY_OF[section] if many else f"{KEY_OF[section]}.{name}")
        return BaseModel.__getattribute__(self, name)

    Section.__getattribute__ = read  # type: ignore[method-assign]
    try:
        yield keys
    finally:
        del Section.__getattribute__


@cache
def all_cases() -> list[tuple[Recipe, int]]:
    return list(cases())


def cases() -> Iterator[tuple[Recipe, int]]:
    """Return recipes that keep the rules and recipes that break each of them."""
    yield recipe(), 1
    for changes in OTHERS:
        values = recipe().model_dump()
        for key, value in changes.items():
            section, _, name = key.partition("__")
            values[section][name] = value
        yield Recipe.model_validate(values), 1
    yield recipe(model__moe=MOE, parallel__expert=2, parallel__pipeline=2, parallel__tensor=2), 8
    for module, test in (
        (test_checks, "test_each_rule_names_value_rule_and_fix"),
        (test_moe_checks, "test_what_breaks"),
    ):
        (function,) = [each for name, each in vars(module).items() if name.startswith(test)]
        (mark,) = function.pytestmark
        for changes, world_size, _ in mark.args[1]:
            try:
                yield recipe(**changes), world_size
            except ValueError:
                continue


def keys_read(check: Rule) -> set[str]:
    found: set[str] = set()
    for case, number in all_cases():
        # An unknown name is refused before any rule is asked.
        with reads() as keys, suppress(ValueError):
            list(check.problems(case, number))
        found |= keys
    # A section is not a key that a person sets, unless it may be absent.
    return {
        key
        for key in found
        if nested_section(FIELDS[key].annotation) is None
        or key in {"model.moe", "data.sources", "data.stages", "optimizer.groups", "diffusion.block_size_schedule"}
    }


# These checks pass the recipe to an objective or an optimiser, which reads its own keys.
DELEGATES = {"_objective_suits", "_family_takes_the_options"}


@pytest.mark.parametrize("check", EVERY, ids=lambda check: check.problems.__name__.strip("_"))
def test_a_rule_names_the_keys_that_its_check_reads(check: Rule) -> None:
    assert set(check.keys) <= FIELDS.keys()
    assert len(set(check.keys)) == len(check.keys)
    if check.problems.__name__ not in DELEGATES:
        # The number of processes reaches a check as the world size; most checks of a mixture ask whether there is one.
        apart = {"launch.processes", "model.moe"}
        assert keys_read(check) - apart == set(check.keys) - apart


def test_a_check_of_which_the_keys_are_forgotten_is_seen() -> None:
    mine: list[Rule] = []

    @rule("train.steps", of=mine)
    def _both(recipe: Recipe, world_size: int) -> Iterator[str]:
        """Check that there are more steps than warm-up steps."""
        if recipe.train.steps < recipe.optimizer.warmup_steps:
            yield "no"

    assert keys_read(mine[0]) == {"train.steps", "optimizer.warmup_steps"}


def test_the_rules_that_are_explained_are_those_that_are_checked() -> None:
    """Check that every problem of a broken recipe comes from a rule, and that no rule occurs twice."""
    assert len(EVERY) >= 40
    assert len({check.text for check in EVERY}) == len(EVERY)
    assert all(check.text.endswith(".") for check in EVERY)
    broken = recipe(model__head_dim=15, optimizer__warmup_steps=11, diffusion__block_size=24)
    with pytest.raises(RecipeError) as refused:
        check_recipe(broken, 1)
    from_rules = [problem for check in RULES for problem in check.problems(broken, 1)]
    assert sorted(refused.value.problems) == sorted(set(from_rules))
    assert len(from_rules) == 3


@pytest.mark.parametrize("docstring", [None, "", "The heads are even."])
def test_a_check_without_a_rule_in_its_docstring_is_refused(docstring: str | None) -> None:
    with pytest.raises(ValueError, match="Check that"):
        rule_text(docstring)
