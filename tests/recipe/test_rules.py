"""Rules: each names the keys that its check reads, so that `recipe explain` cannot say otherwise than the checks."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator

import pytest
from pydantic import BaseModel

from bd3_scale.recipe.checks import DATA_RULES, RULES
from bd3_scale.recipe.reference import fields
from bd3_scale.recipe.rules import Rule, rule_text
from bd3_scale.recipe.schema import Recipe

EVERY = [*RULES, *DATA_RULES]
KEYS = {field.key for field in fields()}
SECTIONS = tuple(
    name
    for name, field in Recipe.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
)
# Checks that hand the recipe to an objective or an optimiser, which reads the keys.
DELEGATES = {"diffusion.objective", "optimizer.family"}


def source(rule: Rule) -> str:
    """The source of a check, and of the private helpers of its module that it calls."""
    check = inspect.unwrap(rule.problems)
    text = inspect.getsource(check)
    helpers = re.findall(r"\b(_\w+|deadline_problem)\(", text.partition("\n")[2])
    module = sys.modules[check.__module__]
    return text[text.index("def ") :] + "".join(
        inspect.getsource(getattr(module, name)) for name in dict.fromkeys(helpers) if name != check.__name__
    )


def keys_in(text: str) -> Iterator[str]:
    """Keys that a text reads (`recipe.train.steps`, `parallel.tensor`) or names in a message (`train.steps=`)."""
    text = text.replace("model.moe is", "").replace("recipe.model.moe", "").replace("moe.", "model.moe.")
    text = text.replace("model.model.", "model.")
    for key in re.findall(rf"\b(?:{'|'.join(SECTIONS)})(?:\.[a-z_]+)+", text):
        parts = key.split(".")
        for length in range(len(parts), 1, -1):
            if (shorter := ".".join(parts[:length])) in KEYS:
                yield shorter
                break


@pytest.mark.parametrize("rule", EVERY, ids=lambda rule: rule.problems.__name__.strip("_"))
def test_a_rule_names_exactly_the_keys_that_its_check_reads(rule: Rule) -> None:
    assert set(rule.keys) <= KEYS
    assert len(set(rule.keys)) == len(rule.keys)
    text = source(rule)
    read = set(keys_in(text)) - {"model.moe"} if "model.moe" not in rule.keys else set(keys_in(text))
    # The last name alone: a check takes `optimizer.lr` of a section that it has under another name.
    unread = {key for key in rule.keys if not re.search(rf"\b{key.rpartition('.')[2]}s?\b", text)}
    properties = {"query_groups": "model.num_query_groups", "head_size": "model.head_dim", "block_sizes": "block_size"}
    properties |= {"model_size": "", "rotary_channels": "model.rotary_fraction", "chunks": "pipeline", "remotes": "s"}
    through = "".join(keys for name, keys in properties.items() if re.search(rf"\b{name}\b", text))
    if not DELEGATES & set(rule.keys):
        assert {key for key in unread if not any(part in through for part in (key, "block_size"))} == set()
    assert read - set(rule.keys) == set()


def test_every_rule_is_a_sentence_and_none_stands_twice() -> None:
    assert len(EVERY) >= 40
    assert len({rule.text for rule in EVERY}) == len(EVERY)
    for rule in EVERY:
        assert rule.text[0].isupper()
        assert rule.text.endswith(".")


@pytest.mark.parametrize("docstring", [None, "", "The heads are even."])
def test_a_check_without_a_rule_in_its_docstring_is_refused(docstring: str | None) -> None:
    with pytest.raises(ValueError, match="Check that"):
        rule_text(docstring)
