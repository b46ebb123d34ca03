"""What every part of a recipe is: frozen, strict, and without control characters."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
# Of a run.
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


# C0, DEL, C1, the line and paragraph separators, and halves of a pair, which are what a byte that is no UTF-8 becomes.
_CONTROL = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029\\ud800-\\udfff]")


def without_controls(text: str) -> str:
    """Return `text`. ValueError: it holds a control character, which scripts and terminals take for more than text."""
    if found := _CONTROL.search(text):
        raise ValueError(f"must be text without control characters (here U+{ord(found[0]):04X})")
    return text


class RecipeError(ValueError):
    """What is wrong with a recipe: every problem that was found, one line each."""

    def __init__(self, problems: Sequence[str], source: str = "recipe") -> None:
        self.problems = tuple(problems)
        separator = "\n  - " if len(self.problems) > 1 else " "
        super().__init__(f"{source}:" + "".join(separator + problem for problem in self.problems))


class Section(BaseModel):
    """A frozen part of the recipe; an unknown key is an error, and so is a value that would need a conversion, or text
    with a control character.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _text_is_data(cls, value: Any) -> Any:
        for text in _texts(value):
            without_controls(text)
        return value


def _texts(value: Any) -> Iterator[str]:
    """All text in the value of a field; sections in it have seen to theirs."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts((*value.keys(), *value.values()))
    elif isinstance(value, tuple):
        for item in value:
            yield from _texts(item)
