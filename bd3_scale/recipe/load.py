"""Load a recipe from YAML files and dotted overrides, and write it back as text."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from bd3_scale.recipe.library import find_recipe
from bd3_scale.recipe.plain_yaml import LIMIT_BYTES, dump_yaml, parse_yaml
from bd3_scale.recipe.schema import MOE_TRAINING, Recipe, RecipeError
from bd3_scale.recipe.section import dotted_fields
from bd3_scale.registry import import_plugins
from bd3_scale.resilience.readers import read_regular, reader

T = TypeVar("T", bound=BaseModel)
_LONGEST_CHAIN = 32
_MOST_PROBLEMS = 20
_WIDTH = 200
_NAME = re.compile(r"[\w.<-]{1,80}")


@reader("a recipe")
def load_recipe(path: str | Path, overrides: Sequence[str] = (), sections: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe, the files that it `extends` (relative to the file), and overrides such as `optimizer.lr=1e-3`.

    Mappings merge key by key, the extending file over the extended one and the overrides over both; any other value
    replaces. Scalars follow YAML 1.2's core schema: `1e-3` is a number, `no` is text.

    Args:
        path: a file, or where there is none, the name of a recipe of the package, such as "quickstart".
        sections: sections that are decided elsewhere, such as the model of an import. The recipe must leave them out,
            except for the keys of `model.moe` that matter in training only.

    Raises:
        RecipeError: a file that cannot be read or parsed, a circle of `extends`, an unknown key, a value of the wrong
            type or outside its range. All problems of the merged recipe are listed, each by its dotted path.
    """
    path = find_recipe(path)
    merged = _read_extended(path, ())
    for override in overrides:
        merged = _merge(merged, _parse_override(override))
    if decided := sorted(key for key in merged.keys() & (sections or {}).keys() if not _trains_experts(merged[key])):
        raise RecipeError(
            [f"{key}: is decided by the model that is adapted; leave it out" for key in decided], str(path)
        )
    return _validate(_merge(dict(sections or {}), merged), Recipe, path)


def _trains_experts(section: Any) -> bool:
    """Return whether a section sets no more of a model than how its experts train."""
    moe = section.get("moe") if isinstance(section, dict) else None
    return isinstance(moe, dict) and section.keys() == {"moe"} and moe.keys() <= MOE_TRAINING


@reader("YAML")
def load_section(path: Path, section: type[T]) -> T:
    """Read a YAML file with the keys of another section by the same rules. RecipeError: as in `load_recipe`."""
    return _validate(_read_extended(path, ()), section, path)


@reader("a recipe")
def recipe_files(path: str | Path) -> list[Path]:
    """Return the absolute paths of a recipe and of the files that it extends. RecipeError: as in `load_recipe`."""
    files: list[Path] = []
    _read_extended(find_recipe(path), (), files)
    return files


@reader("a recipe")
def merged_yaml(path: str | Path) -> dict[str, Any]:
    """Return the content of a recipe merged with what it extends, not validated. RecipeError: as in `load_recipe`."""
    return _read_extended(find_recipe(path), ())


def with_plugins(recipe: Recipe, more: Sequence[str] = ()) -> Recipe:
    """Import the plug-ins of a recipe, and `more` from the command line; return the recipe with all of them.

    ValueError: one cannot be imported.
    """
    plugins = tuple(dict.fromkeys((*recipe.plugins, *more)))
    import_plugins(plugins)
    return recipe.model_copy(update={"plugins": plugins})


def resolved_yaml(recipe: Recipe) -> str:
    """Return the whole recipe as YAML, defaults included; loading it gives an equal recipe."""
    return dump_yaml(recipe.model_dump(mode="json"))


def recipe_hash(recipe: Recipe) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of the resolved recipe."""
    canonical = json.dumps(recipe.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _read_extended(path: Path, extending: tuple[Path, ...], files: list[Path] | None = None) -> dict[str, Any]:
    """Return the merged content of `path`; append every file that was read to `files`."""
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
        # A stranger's recipe may name any file in `extends`: the message must not show what it holds.
        raise RecipeError([f"must hold a mapping of keys to values, not {_type_name(content)}{by}"], str(path))
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
        more = [f"and {len(details) - _MOST_PROBLEMS} more"] if len(details) > _MOST_PROBLEMS else []
        raise RecipeError(
            [*(_explain(detail, section) for detail in details[:_MOST_PROBLEMS]), *more], str(path)
        ) from None


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
        # A stranger's recipe may name any file in `extends`: the message must not show a line of it.
        shown = key if _NAME.fullmatch(key) else "a key that is no name"
        return f"{shown}: unknown key; {near_keys(key, section)}"
    if detail["type"] == "missing" and key == "model":
        return "model: is missing; add the section, or adapt a model with this recipe: `bd3-scale adapt MODEL RECIPE`"
    if detail["type"] == "missing":
        return f"{key}: is missing and has no default"
    if detail["type"] == "model_type":
        return f"{key}: must be a mapping of keys to values, not {_as_yaml(detail['input'])}"
    if detail["type"] == "tuple_type":
        return (
            f"{key}: must be a list, such as [{_as_yaml(detail['input']).strip('[]')}], not {_as_yaml(detail['input'])}"
        )
    rule = re.sub(r"^\w+ should", "must", detail["msg"].removeprefix("Value error, "))
    return f"{key}: {rule}, not {_as_yaml(detail['input'])}"


def _type_name(content: object) -> str:
    return {str: "text", list: "a list", type(None): "nothing"}.get(type(content), "a number")


def _as_yaml(value: object) -> str:
    shown = json.dumps(value, ensure_ascii=False, default=str)
    shown = shown if shown.isprintable() else json.dumps(value, default=str)
    return shown if len(shown) <= _WIDTH else f"{shown[:_WIDTH]}…"


def near_keys(key: str, section: type[BaseModel]) -> str:
    """Return a hint for a key that `section` does not have: "did you mean optimizer.lr?", or the keys beside it."""
    parent, _, name = re.sub(r"\.\d+(?=\.)", "[]", key).rpartition(".")
    keys_by_name: dict[str, list[str]] = {}
    for known, _ in dotted_fields(section):
        keys_by_name.setdefault(known.rpartition(".")[2], []).append(known)
    siblings = {k.rpartition(".")[2]: k for k, _ in dotted_fields(section) if k.rpartition(".")[0] == parent}
    if near := difflib.get_close_matches(name, siblings, 1):
        return f"did you mean {siblings[near[0]]}?"
    elsewhere = {n: outside for n, keys in keys_by_name.items() if (outside := [k for k in keys if "[]" not in k])}
    if near := difflib.get_close_matches(name, elsewhere, 1):
        return f"did you mean {' or '.join(elsewhere[near[0]])}?"
    known_here = siblings or dict.fromkeys(section.model_fields)
    return f"known here: {', '.join(known_here)}"
