"""`bd3-scale checkpoint list|verify`; what a command needs is imported when it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from bd3_scale.observe.console import Console, put, styled
from bd3_scale.observe.progress import Bar

app = typer.Typer(help="The checkpoints of a run: what there is, and whether it is sound.", no_args_is_help=True)

Where = Annotated[Path, typer.Argument(help="A checkpoint, or a run directory for all of its.", metavar="PATH")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command("list", epilog="Example: bd3-scale checkpoint list runs/quickstart")
def list_command(path: Where, as_json: AsJson = False) -> None:
    """Steps, sizes and held-out NELBO of the checkpoints of a run, oldest first."""
    from bd3_scale.checkpoint.verify import describe

    found: list[dict[str, Any]] = []
    for folder in _folders(path):
        try:
            found.append(describe(folder))
        except (ValueError, OSError) as error:
            found.append({"name": folder.name, "problem": str(error)})
    if as_json:
        put(json.dumps(found))
        return
    table = Table("checkpoint", "step", "GB", "ranks", "states", "NELBO", "skipped steps", title=str(path))
    for one in found:
        if "problem" in one:
            table.add_row(one["name"], styled((one["problem"], "red")))
            continue
        nelbo = "" if one["nelbo"] is None else f"{one['nelbo']:.4f}"
        size, states = f"{one['bytes'] / 1e9:.3f}", ", ".join(one["states"])
        table.add_row(one["name"], str(one["step"]), size, str(one["ranks"]), states, nelbo, str(one["skipped"]))
    Console().print(table)


@app.command(epilog="Example: bd3-scale checkpoint verify runs/quickstart")
def verify(
    path: Where,
    fast: Annotated[bool, typer.Option("--fast", help="Compare sizes alone, without reading the files.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare every file with the size and hash that were written; exit code 1 where one differs."""
    from bd3_scale.checkpoint.verify import check_checkpoint

    folders = _folders(path)
    problems: dict[str, str | None] = {}
    with Bar("checkpoints") as bar:
        for number, folder in enumerate(folders, 1):
            try:
                check_checkpoint(folder, "fast" if fast else "full")
                problems[folder.name] = None
            except (ValueError, OSError) as error:
                problems[folder.name] = str(error)
            bar.show(number, len(folders))
    if as_json:
        put(json.dumps(problems))
    else:
        for name, problem in problems.items():
            Console(soft_wrap=True).print(styled(f"{name}: ", (problem or "sound", "red" if problem else "")))
    if any(problems.values()):
        raise typer.Exit(1)


def _folders(path: Path) -> list[Path]:
    """ValueError: there is none."""
    from bd3_scale.checkpoint.folder import list_checkpoints, step_of
    from bd3_scale.checkpoint.manifest import MANIFEST

    if (path / MANIFEST).is_file() or step_of(path) is not None:
        return [path]
    found = list_checkpoints(path / "checkpoints")
    if not found:
        raise ValueError(f"{path} is neither a checkpoint nor a run directory with one in {path / 'checkpoints'}")
    return found
