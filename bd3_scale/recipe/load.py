"""From YAML files and dotted overrides to a validated recipe, and back to text."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from bd3_scale.recipe.schema import ImportedRecipe, Recipe, RecipeError

T = TypeVar("T", bound=BaseModel)


def load_recipe(path: Path, overrides: Sequence[str] = (), sections: Mapping[str, Any] | None = None) -> Recipe:
    """Reads a recipe, what it `extends` (relative to the file), and overrides such as `optimizer.lr=1e-3`.

    Mappings merge key by key, the extending file over the extended one and the overrides over both; any other value
    replaces. `sections` are what is decided elsewhere, the model of an import. Scalars follow YAML 1.2's core schema,
    so that `1e-3` is a number and `no` is text.

    Raises:
        RecipeError: a file that cannot be read or parsed, a circle of `extends`, an unknown key, a value of the wrong
            type or outside its range. All problems of the merged recipe are listed, each by its dotted path.
    """
    merged = _read_extended(path, ())
    for override in overrides:
        merged = _merge(merged, _parse_override(override))
    if decided := sorted(merged.keys() & (sections or {}).keys()):
        raise RecipeError(
            [f"{key}: is decided by the model that is adapted; leave it out" for key in decided], str(path)
        )
    return _validate({**merged, **(sections or {})}, Recipe, path)


def load_section(path: Path, section: type[T]) -> T:
    """Reads a YAML file of other keys than a recipe's by the same rules. RecipeError as of `load_recipe`."""
    return _validate(_read_extended(path, ()), section, path)


def recipe_files(path: Path) -> list[Path]:
    """A recipe and the files that it extends, absolute. Raises RecipeError as `load_recipe` does."""
    files: list[Path] = []
    _read_extended(path, (), files)
    return files


def resolved_yaml(recipe: Recipe | ImportedRecipe) -> str:
    """The whole recipe as YAML, defaults included; loading it gives an equal recipe."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def recipe_hash(recipe: Recipe) -> str:
    """16 hexadecimal digits of the SHA-256 of the resolved recipe."""
    canonical = json.dumps(recipe.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


class _Loader(yaml.SafeLoader):
    """The core schema of YAML 1.2; PyYAML follows 1.1, where `1e-3` is text, `no` is false and `012` is ten.

    Beyond it, digits may be grouped (`10_000`), and a key that appears twice is an error.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} appears twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"(?:~|null)?$", ["~", "n", ""]),
    ("bool", r"(?:true|false)$", ["t", "f"]),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)$", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?$",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


class _Dumper(yaml.SafeDumper):
    """Quotes exactly the text that `_Loader` would read as something else."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def _read_extended(path: Path, extending: tuple[Path, ...], files: list[Path] | None = None) -> dict[str, Any]:
    """The merged content; every file that was read is appended to `files`."""
    chain = (*extending, path.resolve())
    if files is not None:
        files.append(chain[-1])
    if chain[-1] in extending:
        raise RecipeError([f"`extends` runs in a circle: {' -> '.join(map(str, chain))}"], str(path))
    by = f", which {extending[-1]} extends" if extending else ""
    try:
        content = yaml.load(path.read_bytes(), _Loader)
    except OSError as error:
        raise RecipeError([f"cannot be read: {error.strerror}{by}"], str(path)) from None
    except yaml.YAMLError as error:
        raise RecipeError([f"is not valid YAML: {error}"], str(path)) from None
    if not isinstance(content, dict):
        raise RecipeError([f"must hold a mapping of keys to values, not {content!r}"], str(path))
    if "extends" not in content:
        return content
    base = content.pop("extends")
    if not isinstance(base, str):
        raise RecipeError([f"extends: must name one file, relative to this one, not {base!r}"], str(path))
    return _merge(_read_extended(path.parent / base, chain, files), content)


def _validate(content: Mapping[str, Any], section: type[T], path: Path) -> T:
    try:
        return section.model_validate(content)
    except ValidationError as error:
        raise RecipeError([_explain(detail, section) for detail in error.errors()], str(path)) from None


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise RecipeError([f"{override!r} must read key=value, such as optimizer.lr=1e-3"], "override")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
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
        return f"{key}: unknown key; {_suggestion(key, section)}"
    if detail["type"] == "missing":
        return f"{key}: is missing and has no default"
    if detail["type"] == "model_type":
        return f"{key}: must be a mapping of keys to values, not {_as_yaml(detail['input'])}"
    rule = re.sub(r"^\w+ should", "must", detail["msg"].removeprefix("Value error, "))
    return f"{key}: {rule}, not {_as_yaml(detail['input'])}"


def _as_yaml(value: object) -> str:
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return shown if shown.isprintable() else json.dumps(value, default=str)


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
