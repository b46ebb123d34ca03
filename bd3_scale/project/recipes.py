"""List, show and copy the recipes of the package."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bd3_scale.recipe.library import library, named_recipe
from bd3_scale.recipe.load import load_recipe, merged_yaml, recipe_files, resolved_yaml
from bd3_scale.recipe.plain_yaml import LIMIT_BYTES, dump_yaml
from bd3_scale.recipe.schema import LaunchRecipe, ParallelRecipe, Recipe
from bd3_scale.recipe.section import nested_section
from bd3_scale.resilience.files import check_writable, write_atomically
from bd3_scale.resilience.readers import read_regular

_PARAMETERS = re.compile(r"^# parameters: ([\d.]+) ([MB])$", re.MULTILINE)
_NODES = re.compile(r"^# nodes: (\d+) x (\d+)$", re.MULTILINE)
_EXTENDS = re.compile(r"^extends:.*$", re.MULTILINE)


@dataclass(frozen=True)
class RecipeSummary:
    """One line of `bd3-scale recipe list`.

    Attributes:
        name: as commands take it.
        comment: the first sentence of its first comment.
        parameters: of the model; None where the model is the one that is adapted.
        nodes, ranks: that its layout is made for, the ranks on each node.
    """

    name: str
    comment: str
    parameters: float | None
    nodes: int
    ranks: int


def summaries() -> list[RecipeSummary]:
    """Return a summary of every recipe of the package."""
    return [_summary(name, path) for name, path in library().items()]


def _text(path: Path) -> str:
    return read_regular(path, LIMIT_BYTES).decode()


def _summary(name: str, path: Path) -> RecipeSummary:
    text = _text(path)
    comment = " ".join(line[1:].strip() for line in text.partition("\n\n")[0].splitlines() if line.startswith("# "))
    first_sentence = re.split(r"(?<=[.:])\s", comment, maxsplit=1)[0].rstrip(".:")
    # A recipe without the line has the model of the one that it extends.
    stated = (_PARAMETERS.search(_text(file)) for file in recipe_files(path))
    found = next((match for match in stated if match), None)
    parameters = float(found[1]) * {"M": 1e6, "B": 1e9}[found[2]] if found else None
    return RecipeSummary(name, first_sentence, parameters, *_nodes_and_ranks(path, text))


def _nodes_and_ranks(path: Path, text: str) -> tuple[int, int]:
    if nodes := _NODES.search(text):
        return int(nodes[1]), int(nodes[2])
    content = merged_yaml(path)
    launch = LaunchRecipe.model_validate(content.get("launch", {}))
    return 1, launch.processes or ParallelRecipe.model_validate(content.get("parallel", {})).fewest_ranks


def recipe_text(name: str, *, resolved: bool = False) -> str:
    """Return a recipe of the package: the file with its comments, or `resolved` with defaults and `extends` merged.

    An adaptation has no model section before it is adapted; its resolved form shows what it says about the model.
    RecipeError: there is no such recipe.
    """
    path = named_recipe(name)
    if not resolved:
        return _text(path)
    content = merged_yaml(path)
    model = content.get("model")
    if model is not None and "num_layers" in model:
        return resolved_yaml(load_recipe(path))
    values: dict[str, Any] = {}
    for key, field in Recipe.model_fields.items():
        section = nested_section(field.annotation)
        if key == "model":
            values |= {key: model} if model else {}
        elif section is None:
            values[key] = content.get(key, field.default)
        else:
            values[key] = section.model_validate(content.get(key, {})).model_dump(mode="json")
    return dump_yaml(values)


def copy_recipe(name: str, file: Path) -> list[Path]:
    """Copy a recipe of the package to `file`, and the recipes that it extends beside it; return the new files.

    The copies keep their comments, and their `extends` names the copy beside them.

    Raises:
        RecipeError: there is no such recipe.
        FileExistsError: a file is there already and has other content.
    """
    sources = recipe_files(named_recipe(name))
    targets = [file, *(file.parent / source.name for source in sources[1:])]
    texts = {}
    for number, (source, target) in enumerate(zip(sources, targets, strict=True)):
        text = _text(source)
        if number + 1 < len(targets):
            text = _EXTENDS.sub(f"extends: {targets[number + 1].name}", text)
        if target in texts:
            raise ValueError(f"{file} would be both {name} and {source.stem}, which it extends: take another name")
        texts[target] = text
    # The recipe itself is never overwritten; one that it extends may be there from another copy.
    for target, text in texts.items():
        if target == file and os.path.lexists(target):
            raise FileExistsError(f"{target} is there already: choose another file, or move that one away")
        if os.path.lexists(target) and _text(target) != text:
            raise FileExistsError(
                f"{name} extends {target.name}, and {target} is there with other content: choose another folder"
            )
    new = [target for target in texts if not os.path.lexists(target)]
    check_writable(file.parent)
    for target in reversed(new):
        write_atomically(target, texts[target])
    return new
