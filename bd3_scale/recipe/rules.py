"""Register the rules that join several keys of a recipe, each with the keys that it concerns.

`check_recipe` runs every registered rule, and `bd3-scale recipe explain` shows the same list: a rule is written once.

    @rule("optimizer.warmup_steps", "train.steps")
    def _warmup_fits(recipe, world_size):
        \"""Check that the warm-up is not longer than the training.\"""
        if ...:
            yield "optimizer.warmup_steps=20 exceeds train.steps=10: lower it or train longer"
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bd3_scale.recipe.schema import Recipe

Check = Callable[["Recipe", int], Iterator[str]]
_PREFIX = "Check that "


@dataclass(frozen=True)
class Rule:
    """A check that joins several keys.

    Attributes:
        keys: dotted keys of the fields that take part.
        text: the rule as a sentence, from the docstring of the check.
        problems: yields one message for each way in which a recipe breaks the rule.
    """

    keys: tuple[str, ...]
    text: str
    problems: Check


# Checks that need no data. Their second argument is the number of ranks of the run, on all nodes.
RULES: list[Rule] = []
# Checks that need prepared data. Their second argument is the document multiple: the tokens to a multiple of which
# documents were padded.
DATA_RULES: list[Rule] = []


def rule(*keys: str, of: list[Rule] = RULES) -> Callable[[Check], Check]:
    """Return a decorator that registers a check of `keys`; its docstring's first line is the text of the rule."""

    def add(check: Check) -> Check:
        of.append(Rule(keys, rule_text(check.__doc__), check))
        return check

    return add


def in_order(rules: Iterable[Rule]) -> list[Rule]:
    """Return rules sorted by their keys: the order of registration depends on which module was imported first."""
    return sorted(rules, key=lambda each: (each.keys, each.text))


def rule_text(docstring: str | None) -> str:
    """Return the rule that the first line of a docstring such as "Check that heads are even." states."""
    first = (docstring or "").partition("\n")[0]
    if not first.startswith(_PREFIX):
        raise ValueError(f"the docstring of a rule begins with {_PREFIX!r}, not {first!r}")
    text = first.removeprefix(_PREFIX)
    # A key keeps its spelling: "num_attention_heads is ..." and "parallel.tensor divides ...".
    is_key = re.match(r"\w+[._]\w", text) is not None
    return text if is_key else text[0].upper() + text[1:]


def nearest_multiples(value: int, factor: int) -> str:
    """Return the multiples of `factor` next to `value`, for a message: "63 or 66"."""
    below = value // factor * factor
    return f"{below} or {below + factor}" if below else str(factor)


def nearest_divisors(value: int, near: int) -> str:
    """Return the divisors of `value` next to `near`, for a message: "2 or 4"."""
    divisors = [d for d in range(1, value + 1) if value % d == 0]
    return " or ".join(map(str, [d for d in divisors if d <= near][-1:] + [d for d in divisors if d > near][:1]))
