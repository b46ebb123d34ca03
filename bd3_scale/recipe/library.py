"""Find the recipes that come with the package, by name: `quickstart`, `paper-small/quick`."""

from __future__ import annotations

import difflib
from pathlib import Path

from bd3_scale.recipe.section import RecipeError

_PACKAGE = Path(__file__).resolve().parents[1]


def recipes_folder() -> Path:
    """Return the folder of the package's recipes: in an installed package its data, in a clone `recipes/`."""
    installed = _PACKAGE / "recipes"
    return installed if installed.is_dir() else _PACKAGE.parent / "recipes"


def library() -> dict[str, Path]:
    """Return the recipes of the package: name -> file, sorted by name, those in folders last."""
    folder = recipes_folder()
    files = sorted(folder.rglob("*.yaml"), key=lambda path: (len(path.parts), path))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


def named_recipe(name: str) -> Path:
    """Return the file of a recipe of the package. RecipeError: none has this name; the message lists the nearest."""
    recipes = library()
    if name in recipes:
        return recipes[name]
    near = difflib.get_close_matches(name.removesuffix(".yaml"), recipes, 3)
    hint = f"did you mean {' or '.join(near)}?" if near else "`bd3-scale recipe list` shows the names"
    raise RecipeError([f"no recipe of the package has this name; {hint}"], name)


def find_recipe(path: str | Path) -> Path:
    """Return `path`, or the recipe of the package that has this name where there is no file at `path`.

    RecipeError: there is neither. A path that is there is returned whatever it is; whoever reads it reports the rest.
    """
    try:
        # lstat: a broken link is a mistake in that link, not a name.
        Path(path).lstat()
    except FileNotFoundError:
        pass
    except OSError:
        return Path(path)
    else:
        # A folder is no recipe: one that is called like a recipe, such as a project's, does not hide that.
        if not (Path(path).is_dir() and str(path) in library()):
            return Path(path)
    try:
        return named_recipe(str(path))
    except RecipeError as error:
        raise RecipeError([f"cannot be read: No such file or directory, and {error.problems[0]}"], str(path)) from None
