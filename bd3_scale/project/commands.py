"""Run `bd3-scale recipe list|show|copy|explain` and `bd3-scale init`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from bd3_scale.observe.console import Console, put, say

if TYPE_CHECKING:
    from bd3_scale.recipe.reference import FieldDoc

app = typer.Typer()
recipe_app = typer.Typer(help="List, show, copy and explain recipes.", no_args_is_help=True)
app.add_typer(recipe_app, name="recipe")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Name = Annotated[str, typer.Argument(help="A name of `bd3-scale recipe list`.")]


@recipe_app.command("list", epilog="Example: bd3-scale recipe list")
def list_recipes(as_json: AsJson = False) -> None:
    """List the recipes of the package: name, what it trains, parameters, and the ranks that it is made for."""
    import dataclasses
    import json

    from bd3_scale.project.recipes import summaries

    found = summaries()
    if as_json:
        put(json.dumps([dataclasses.asdict(each) for each in found], indent=1))
        return
    table = Table("recipe", "what it trains", "parameters", "nodes x ranks")
    for each in found:
        size = "the adapted model's" if each.parameters is None else _readable(each.parameters)
        table.add_row(each.name, each.comment, size, f"{each.nodes} x {each.ranks}")
    Console().print(table)


def _readable(count: float) -> str:
    """Return a count with three digits, such as 124 M or 1.05 B."""
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M"


@recipe_app.command(epilog="Example: bd3-scale recipe show quickstart --resolved")
def show(
    name: Name,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="With every default, and `extends` merged; without comments.")
    ] = False,
) -> None:
    """Print a recipe of the package with its comments."""
    from bd3_scale.project.recipes import recipe_text

    put(recipe_text(name, resolved=resolved), end="")


@recipe_app.command(epilog="Example: bd3-scale recipe copy quickstart mine.yaml")
def copy(name: Name, file: Annotated[Path, typer.Argument(help="The new file; it must not exist.")]) -> None:
    """Copy a recipe of the package to a file of your own, and the recipes that it extends beside it."""
    from bd3_scale.project.recipes import copy_recipe

    for path in copy_recipe(name, file):
        say(f"wrote {path}")


@recipe_app.command(epilog="Example: bd3-scale recipe explain diffusion.block_size")
def explain(
    key: Annotated[
        str | None,
        typer.Argument(help="A key such as diffusion.block_size, or a section such as optimizer.", show_default="all"),
    ] = None,
    as_json: AsJson = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page docs/recipe.md.")] = False,
) -> None:
    """Explain a key of the recipe: type, default, unit, meaning, and the rules that join it with other keys."""
    import dataclasses
    import json

    from bd3_scale.project.markdown import reference_page
    from bd3_scale.recipe import reference

    found = reference.explain(key) if key is not None else reference.fields()
    if as_json:
        put(json.dumps([dataclasses.asdict(field) for field in found], indent=1))
    elif markdown:
        if key is not None:
            raise typer.BadParameter("--markdown prints the whole page: leave KEY out")
        put(reference_page(), end="")
    elif len(found) == 1:
        _show_field(found[0])
    else:
        _show_section(key, found)


def _show_field(field: FieldDoc) -> None:
    console = Console()
    console.print(field.key, style="bold")
    console.print(field.description)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_row("type", field.type)
    table.add_row("default", field.default)
    if field.unit:
        table.add_row("unit", field.unit)
    console.print(table)
    _show_rules(console, field)


def _show_rules(console: Console, field: FieldDoc) -> None:
    for text, keys in field.rules:
        others = [key for key in keys if key != field.key]
        console.print(f"rule: {text}" + (f" (with {', '.join(others)})" if others else ""))


def _show_section(key: str | None, found: list[FieldDoc]) -> None:
    from bd3_scale.recipe import reference

    title = key or "All keys of a recipe"
    table = Table("key", "type", "default", "unit", "meaning", title=title)
    for field in found:
        if field.is_section and field.key == key:
            continue
        if field.is_section and "." not in field.key:
            table.add_section()
        default = "" if field.is_section and field.default == "null" else field.default
        table.add_row(field.key, field.type, default, field.unit, field.description)
    console = Console()
    if key is not None and (section := reference.section_of(key)) is not None:
        console.print(reference.summary(section))
    console.print(table)
    if found[0].key == key:
        _show_rules(console, found[0])
    console.print("bd3-scale recipe explain KEY   shows the rules of a key", style="dim")


@app.command(epilog="Example: bd3-scale init mine")
def init(folder: Annotated[Path, typer.Argument(help="A new or empty folder.")]) -> None:
    """Make a starter project: a commented recipe, and a README with six commands from text to a model that writes."""
    from bd3_scale.project.starter import make_project

    for path in make_project(folder):
        say(f"wrote {path}")
    say(f"next: put text files into {folder / 'text'}, and follow {folder / 'README.md'}")
