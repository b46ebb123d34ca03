"""From YAML files and dotted overrides to a validated recipe, and back to text."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from bd3_scale.recipe.plain_yaml import LIMIT_BYTES, dump_yaml, parse_yaml
from bd3_scale.recipe.schema import MOE_TRAINING, Recipe, RecipeError
from bd3_scale.registry import import_plugins
from bd3_scale.resilience.readers import read_regular, reader

T = TypeVar("T", bound=BaseModel)
_LONGEST_CHAIN = 32
_NUM_TOLD = 20
_WIDTH = 200
_NAME = re.compile(r"[\w.<-]{1,80}")


@reader("a recipe")
def load_recipe(path: str | Path, overrides: Sequence[str] = (), sections: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe, what it `extends` (relative to the file), and overrides such as `optimizer.lr=1e-3`.

    Mappings merge key by key, the extending file over the extended one and the overrides over both; any other value
    replaces. `sections` are what is decided elsewhere, the model of an import, beside which a recipe may say how its
    experts train. Scalars follow YAML 1.2's core schema,
    so that `1e-3` is a number and `no` is text.

    Raises:
        RecipeError: a file that cannot be read or parsed, a circle of `extends`, an unknown key, a value of the wrong
            type or outside its range. All problems of the merged recipe are listed, each by its dotted path.
    """
    path = Path(path)
    merged = _read_extended(path, ())
    for override in overrides:
        merged = _merge(merged, _parse_override(override))
    if decided := sorted(key for key in merged.keys() & (sections or {}).keys() if not _trains_experts(merged[key])):
        raise RecipeError(
            [f"{key}: is decided by the model that is adapted; leave it out" for key in decided], str(path)
        )
    return _validate(_merge(dict(sections or {}), merged), Recipe, path)


def _trains_experts(section: Any) -> bool:
    """Whether a section says no more of a model than how its experts train."""
    moe = section.get("moe") if isinstance(section, dict) else None
    return isinstance(moe, dict) and section.keys() == {"moe"} and moe.keys() <= MOE_TRAINING


@reader("YAML")
def load_section(path: Path, section: type[T]) -> T:
    """Reads a YAML file of other keys than a recipe's by the same rules. RecipeError as of `load_recipe`."""
    return _validate(_read_extended(path, ()), section, path)


@reader("a recipe")
def recipe_files(path: Path) -> list[Path]:
    """A recipe and the files that it extends, absolute. Raises RecipeError as `load_recipe` does."""
    files: list[Path] = []
    _read_extended(path, (), files)
    return files


def with_plugins(recipe: Recipe, more: Sequence[str] = ()) -> Recipe:
    """Import the plug-ins of a recipe that a person starts, and `more` of the command line; return it with them all.

    ValueError: one cannot be imported.
    """
    plugins = tuple(dict.fromkeys((*recipe.plugins, *more)))
    import_plugins(plugins)
    return recipe.model_copy(update={"plugins": plugins})


def resolved_yaml(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults included; loading it gives an equal recipe."""
    return dump_yaml(recipe.model_dump(mode="json"))


def recipe_hash(recipe: Recipe) -> str:
    """16 hexadecimal digits of the SHA-256 of the resolved recipe."""
    canonical = json.dumps(recipe.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _read_extended(path: Path, extending: tuple[Path, ...], files: list[Path] | None = None) -> dict[str, Any]:
    """The merged content; every file that was read is appended to `files`."""
    chain = (*extending, path.resolve())
    if files is not None:
        files.append(chain[-1])
    if chain[-1] in extending:
        raise RecipeError([f"`extends` runs in a circle: {' -> '.join(map(str, chain))}"], str(path))
    by = f", which {extending[-1]} extends" if extending else ""
    try:
        data = read_regular(path, LIMIT_BYTES)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RecipeError([f"cannot be read: {reason}{by}"], str(path)) from None
    try:
        content = parse_yaml(data)
    except ValueError as error:
        raise RecipeError([f"is not valid YAML: {error}"], str(path)) from None
    if not isinstance(content, dict):
        # Not what it holds: `extends` of a stranger's recipe may name any file.
        raise RecipeError([f"must hold a mapping of keys to values, not {_kind(content)}{by}"], str(path))
    if "extends" not in content:
        return content
    base = content.pop("extends")
    if not isinstance(base, str):
        raise RecipeError([f"extends: must name one file, relative to this one, not {_as_yaml(base)}"], str(path))
    if len(chain) > _LONGEST_CHAIN:
        raise RecipeError([f"extends: more than {_LONGEST_CHAIN} files extend each other"], str(path))
    return _merge(_read_extended(path.parent / base, chain, files), content)


def _validate(content: Mapping[str, Any], section: type[T], path: Path) -> T:
    try:
        return section.model_validate(content)
    except ValidationError as error:
        details = error.errors()
        more = [f"and {len(details) - _NUM_TOLD} more"] if len(details) > _NUM_TOLD else []
        raise RecipeError([*(_explain(detail, section) for detail in details[:_NUM_TOLD]), *more], str(path)) from None


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise RecipeError([f"{override!r} must read key=value, such as optimizer.lr=1e-3"], "override")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise RecipeError([f"the value of {override!r} is not valid YAML: {error}"], "override") from None
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both_are_mappings = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both_are_mappings else value
    return merged


def _explain(detail: Mapping[str, Any], section: type[BaseModel]) -> str:
    key = ".".join(map(str, detail["loc"]))
    if detail["type"] == "extra_forbidden":
        # Not what may be a line of any file, which `extends` of a stranger's recipe names.
        shown = key if _NAME.fullmatch(key) else "a key that is no name"
        return f"{shown}: unknown key; {_suggestion(key, section)}"
    if detail["type"] == "missing":
        return f"{key}: is missing and has no default"
    if detail["type"] == "model_type":
        return f"{key}: must be a mapping of keys to values, not {_as_yaml(detail['input'])}"
    rule = re.sub(r"^\w+ should", "must", detail["msg"].removeprefix("Value error, "))
    return f"{key}: {rule}, not {_as_yaml(detail['input'])}"


def _kind(content: object) -> str:
    return {str: "text", list: "a list", type(None): "nothing"}.get(type(content), "a number")


def _as_yaml(value: object) -> str:
    shown = json.dumps(value, ensure_ascii=False, default=str)
    shown = shown if shown.isprintable() else json.dumps(value, default=str)
    return shown if len(shown) <= _WIDTH else f"{shown[:_WIDTH]}…"


def _suggestion(key: str, section: type[BaseModel]) -> str:
    parent, _, name = key.rpartition(".")
    keys_by_name: dict[str, list[str]] = {}
    for known in _dotted_keys(section, ""):
        keys_by_name.setdefault(known.rpartition(".")[2], []).append(known)
    siblings = {n: k for n, keys in keys_by_name.items() for k in keys if k.rpartition(".")[0] == parent}
    if near := difflib.get_close_matches(name, siblings, 1):
        return f"did you mean {siblings[near[0]]}?"
    if near := difflib.get_close_matches(name, keys_by_name, 1):
        return f"did you mean {' or '.join(keys_by_name[near[0]])}?"
    return f"known here: {', '.join(siblings)}"


def _dotted_keys(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _dotted_keys(field.annotation, f"{prefix}{name}.")
