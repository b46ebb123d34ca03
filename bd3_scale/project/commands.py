"""Run `bd3-scale recipe list|show|copy|explain`, `bd3-scale init` and `bd3-scale doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from bd3_scale.observe.console import Console, put, say, styled
from bd3_scale.resilience.terminal import tell

if TYPE_CHECKING:
    from bd3_scale.launch.findings import Finding
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


@app.command(epilog="Example: bd3-scale doctor --recipe mine.yaml train.micro_batch_size=4")
def doctor(
    context: typer.Context,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Replace values of --recipe.")
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Check the needs of this recipe, too: a YAML file, or a name of `bd3-scale recipe list`.",
            show_default=False,
        ),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="PROFILE",
            help="A site in cluster/profiles, or a YAML file: ask its SLURM, too, and let a job examine one node.",
            show_default=False,
        ),
    ] = None,
    folder: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of runs or data; may be repeated. The first one holds the node's answer for a moment.",
            show_default="the profile's shared_storage, else the current folder",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show what this machine has and what would keep a run from starting or lasting; exit code 1 if anything would."""
    import dataclasses
    import json

    from bd3_scale.launch.cluster_doctor import default_folders, site, visit
    from bd3_scale.launch.doctor import examine
    from bd3_scale.launch.findings import has_problem
    from bd3_scale.launch.profile import load_profile
    from bd3_scale.observe.environment import read_environment
    from bd3_scale.project.needs import needs
    from bd3_scale.recipe.load import load_recipe

    if overrides and recipe is None:
        raise ValueError(f"{overrides[0]} replaces a value of a recipe: name it with --recipe")
    loaded = load_recipe(recipe, overrides or ()) if recipe is not None else None
    profile = load_profile(cluster) if cluster is not None else None
    of_slurm = site(profile) if profile else []
    folders = folder or (default_folders(profile) if profile else [Path.cwd()])
    environment = read_environment()
    machines = {"here": examine(environment, folders, gpus=0, clustered=False) + of_slurm}
    titles = {"here": "this machine"}
    if loaded is not None:
        machines["recipe"] = needs(loaded, environment, context.obj or ())
        titles["recipe"] = f"{recipe} on this machine"
    if profile and not has_problem(of_slurm):
        visited = visit(profile, folders, tell)
        machines["node"], titles["node"] = visited.findings, visited.node
    if as_json:
        findings = {name: [dataclasses.asdict(each) for each in found] for name, found in machines.items()}
        put(json.dumps(dataclasses.asdict(environment) | findings))
    else:
        for name, found in machines.items():
            Console().print(_findings(titles[name], found))
    raise typer.Exit(any(has_problem(found) for found in machines.values()))


def _findings(title: str, findings: list[Finding]) -> Table:
    table = Table("", "", "found", "rule", "fix", title=title)
    styles = {"ok": "green", "warning": "yellow", "problem": "bold red"}
    topic = ""
    for each in findings:
        if each.topic != topic:
            table.add_section()
        verdict = styled((each.verdict, styles[each.verdict]))
        name = f"{each.topic}: {each.name}" if each.topic != topic else each.name
        table.add_row(verdict, name, each.value, each.rule, each.fix)
        topic = each.topic
    return table
