"""Find fields in records such as the JSON object of a line, and explain which fields exist if one is missing."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

NUM_SHOWN = 8
NAME_A_FIELD = "name the field with --field"

_MISSING = object()


def field_value(record: dict[str, Any], field: str, where: str, way_out: str) -> Any:
    """Return the value of a field. Raises ValueError, which ends with `way_out`, if there is no such field."""
    value, around, prefix = _walk(record, field)
    if value is not _MISSING:
        return value
    but = f" but {_listed(around, prefix)}" if around else " and no other"
    raise ValueError(f'{where} has no field "{field}"{but}: {way_out}')


def string_field(record: dict[str, Any], field: str, where: str, way_out: str) -> str:
    """Return the string in a field. Raises ValueError, which ends with `way_out`, if there is none."""
    value = field_value(record, field, where, way_out)
    if isinstance(value, str):
        return value
    _, around, prefix = _walk(record, field)
    there = f"; the fields are {_listed(around, prefix)}" if around else ""
    raise ValueError(f'{where} has {kind_of(value)} in the field "{field}", not a string{there}: {way_out}')


def text_in(field: str, record: dict[str, Any], where: str) -> str:
    """Return the string in a field that the user can choose with --field. Raises ValueError if there is none."""
    return string_field(record, field, where, NAME_A_FIELD)


def kind_of(value: Any) -> str:
    """Return the JSON type of a value, in words."""
    kinds = {str: "a string", int: "a number", float: "a number", Decimal: "a number", list: "a list"}
    constants = {None: "null", True: "true", False: "false"}
    return constants[value] if value is None or isinstance(value, bool) else kinds.get(type(value), "an object")


def check_unicode(text: str, where: str) -> None:
    """Raise ValueError if a text holds an unpaired surrogate, which a JSON escape can produce."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x} at character {error.start + 1}"
        raise ValueError(f"{where} holds text that is not Unicode ({half} is half of a surrogate pair)") from error


def _walk(record: dict[str, Any], field: str) -> tuple[Any, dict[str, Any], str]:
    """Return the value of a field or `_MISSING`, the innermost object on its path, and the prefix of its fields."""
    value: Any = record
    around, prefix = record, ""
    for name in [field] if field in record else field.split("."):
        if not isinstance(value, dict) or name not in value:
            return _MISSING, around, prefix
        value = value[name]
        if isinstance(value, dict):
            around, prefix = value, f"{prefix}{name}."
    return value, around, prefix


def _listed(record: dict[str, Any], prefix: str) -> str:
    names = [name if name.isprintable() else repr(name) for name in record]
    fields = [f"{prefix}{name} ({kind_of(value)})" for name, value in zip(names, record.values(), strict=True)]
    return ", ".join(fields[:NUM_SHOWN]) + ", …" * (len(fields) > NUM_SHOWN)
