"""Describe every field of a recipe: type, default, unit, meaning, and the rules that it takes part in.

The descriptions are those of the schema, and the rules are those that `check_recipe` runs.
"""

from __future__ import annotations

import json
import types
import typing
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from bd3_scale.recipe.checks import DATA_RULES, RULES
from bd3_scale.recipe.load import near_keys
from bd3_scale.recipe.rules import in_order
from bd3_scale.recipe.schema import Recipe, RecipeError
from bd3_scale.recipe.section import Unit, dotted_fields, nested_section

_NAMES = {int: "integer", float: "number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class FieldDoc:
    """The description of a field.

    Attributes:
        key: dotted; `data.sources[].name` is a key of each item of a list.
        type: in words, with the range.
        default: as YAML; "required" where there is none, "" for a section whose fields have their own.
        unit: of a quantity; else "".
        description: of the field, in sentences.
        rules: that join it with other keys, as (text, keys).
        is_section: whether it holds fields of its own.
    """

    key: str
    type: str
    default: str
    unit: str
    description: str
    rules: tuple[tuple[str, tuple[str, ...]], ...]
    is_section: bool


def fields() -> list[FieldDoc]:
    """Return the description of every field of a recipe, in the order of the schema; sections before their fields."""
    return [_describe(key, field) for key, field in dotted_fields(Recipe)]


def explain(key: str) -> list[FieldDoc]:
    """Return the description of a field, and of those in it where it is a section.

    RecipeError: there is no such key; the message names the nearest one.
    """
    found = [field for field in fields() if field.key == key or field.key.startswith((f"{key}.", f"{key}[]."))]
    if not found:
        raise RecipeError([f"{key}: unknown key; {near_keys(key, Recipe)}"])
    return found


def summary(section: type[BaseModel]) -> str:
    """Return the first paragraph of a section's docstring, on one line."""
    return " ".join((section.__doc__ or "").strip().partition("\n\n")[0].split())


def section_of(key: str) -> type[BaseModel] | None:
    """Return the section at a dotted key; None: the key is no section."""
    return nested_section(dict(dotted_fields(Recipe))[key].annotation)


def _describe(key: str, field: FieldInfo) -> FieldDoc:
    section = nested_section(field.annotation)
    return FieldDoc(
        key=key,
        type=_type(field.annotation, field.metadata),
        default=_default(field),
        unit=_unit(field),
        description=field.description or "",
        rules=tuple((rule.text, rule.keys) for rule in in_order((*RULES, *DATA_RULES)) if key in rule.keys),
        is_section=section is not None,
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.default
    if isinstance(default, BaseModel):
        return ""
    return json.dumps(default)


def _unit(field: FieldInfo) -> str:
    return next((found.name for found in _metadata(field.annotation, field.metadata) if isinstance(found, Unit)), "")


def _metadata(annotation: Any, metadata: Any) -> list[Any]:
    """Return the metadata of a type and of the types in it, such as the items of a list."""
    found = list(metadata)
    for each in typing.get_args(annotation):
        found += _metadata(each, getattr(each, "__metadata__", ()))
    return found


def _type(annotation: Any, metadata: Any = ()) -> str:
    """Return a type in words, with the range that `metadata` sets."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0], annotation.__metadata__)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        several = [_type(argument, metadata) for argument in arguments if argument is not type(None)]
        return " or ".join(several) + "; or null" * (type(None) in arguments)
    if origin is tuple and arguments[-1] is ...:
        return f"list of {_plural(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)}: {_type(arguments[0])} each"
    if origin is dict:
        return f"mapping of names to {_plural(arguments[1])}"
    if nested_section(annotation) is not None:
        return "section"
    return ", ".join(filter(None, (_NAMES[annotation], _range(metadata))))


def _plural(annotation: Any) -> str:
    words = _type(annotation)
    name, comma, rest = words.partition(",")
    plurals = {"text": "texts", "section": "sections", "integer": "integers", "number": "numbers"}
    return plurals.get(name, name) + comma + rest


def _range(metadata: Any) -> str:
    """Return bounds in words; metadata may hold pydantic's `Field(ge=1)` in place of its bounds."""
    flat = [bound for each in metadata for bound in (each.metadata if isinstance(each, FieldInfo) else [each])]
    words = {"ge": "{} or more", "gt": "above {}", "le": "{} or less", "lt": "below {}"}
    bounds = ((text, getattr(bound, name, None)) for name, text in words.items() for bound in flat)
    return ", ".join(text.format(value) for text, value in bounds if value is not None)
