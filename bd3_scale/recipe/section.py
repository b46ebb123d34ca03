"""Define what all sections of a recipe share: frozen and strict fields, text without control characters, and units."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic.fields import FieldInfo

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
# The pattern of the name of a run or of a data source: it is safe as the name of a folder and in a shell.
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


@dataclass(frozen=True)
class Unit:
    """The unit of a field that is a quantity: `steps: Annotated[PositiveInt, Unit("steps")]`. Pydantic ignores it.

    A field without a physical unit has the unit `ratio` (a share, a factor, a probability) or `number` (a seed).
    """

    name: str


# C0, DEL, C1, the line and paragraph separators, and surrogates. Python decodes a byte of a command line that is not
# UTF-8 into a lone surrogate (PEP 383).
_CONTROL = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029\\ud800-\\udfff]")


def without_controls(text: str) -> str:
    """Return `text`. ValueError: it holds a control character, which a script or a terminal would act on."""
    if found := _CONTROL.search(text):
        raise ValueError(f"must be text without control characters (here U+{ord(found[0]):04X})")
    return text


class RecipeError(ValueError):
    """Everything that is wrong with a recipe, one line for each problem.

    Attributes:
        problems: the lines, without the source.
    """

    def __init__(self, problems: Sequence[str], source: str = "recipe") -> None:
        """Build the message from `problems`; source: the file, or "override", that they were found in."""
        self.problems = tuple(problems)
        separator = "\n  - " if len(self.problems) > 1 else " "
        super().__init__(f"{source}:" + "".join(separator + problem for problem in self.problems))


class Section(BaseModel):
    """A frozen part of a recipe. Unknown keys, values that need a conversion and control characters are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _text_is_data(cls, value: Any) -> Any:
        for text in _texts(value):
            without_controls(text)
        return value


def _texts(value: Any) -> Iterator[str]:
    """Yield all text in the value of a field, except that of nested sections, which validate their own."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts((*value.keys(), *value.values()))
    elif isinstance(value, tuple):
        for item in value:
            yield from _texts(item)


def nested_section(annotation: Any) -> type[BaseModel] | None:
    """Return the section in a field's type: in `Moe`, `Moe | None` or `tuple[Source, ...]`; None: there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    sections = (nested_section(argument) for argument in typing.get_args(annotation))
    return next((section for section in sections if section is not None), None)


def holds_many(annotation: Any) -> bool:
    """Return whether a field's type is a list, or null or a list."""
    return typing.get_origin(annotation) is tuple or any(map(holds_many, typing.get_args(annotation)))


def dotted_fields(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield dotted key and field of a section and all sections in it; keys in a list read `data.sources[].name`."""
    for name, field in section.model_fields.items():
        yield prefix + name, field
        if (nested := nested_section(field.annotation)) is not None:
            yield from dotted_fields(nested, f"{prefix}{name}{'[]' * holds_many(field.annotation)}.")
