"""List and verify checkpoints: `bd3-scale checkpoint list|verify`. What a command needs is imported when it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from bd3_scale.observe.console import Console, put, styled
from bd3_scale.observe.progress import Bar

app = typer.Typer(help="List the checkpoints of a run and check that their files are intact.", no_args_is_help=True)

CheckpointPath = Annotated[
    Path, typer.Argument(help="A checkpoint, or a run directory for all of its.", metavar="PATH")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command("list", epilog="Example: bd3-scale checkpoint list runs/quickstart")
def list_command(path: CheckpointPath, as_json: AsJson = False) -> None:
    """Show steps, sizes and held-out NELBO of the checkpoints of a run, oldest first."""
    from bd3_scale.checkpoint.verify import describe

    checkpoints: list[dict[str, Any]] = []
    for folder in _folders(path):
        try:
            checkpoints.append(describe(folder))
        except (ValueError, OSError) as error:
            checkpoints.append({"name": folder.name, "problem": str(error)})
    if as_json:
        put(json.dumps(checkpoints))
        return
    table = Table("checkpoint", "step", "GB", "ranks", "states", "NELBO", "skipped steps", title=str(path))
    for entry in checkpoints:
        if "problem" in entry:
            table.add_row(entry["name"], styled((entry["problem"], "red")))
            continue
        nelbo = "" if entry["nelbo"] is None else f"{entry['nelbo']:.4f}"
        size, states = f"{entry['bytes'] / 1e9:.3f}", ", ".join(entry["states"])
        table.add_row(
            entry["name"], str(entry["step"]), size, str(entry["ranks"]), states, nelbo, str(entry["skipped"])
        )
    Console().print(table)


@app.command(epilog="Example: bd3-scale checkpoint verify runs/quickstart")
def verify(
    path: CheckpointPath,
    fast: Annotated[bool, typer.Option("--fast", help="Compare sizes alone, without reading the files.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare every file with the size and hash that were written; exit code 1 if one differs."""
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
    """Return the checkpoint at `path`, or all of the run directory `path`. ValueError: there is none."""
    from bd3_scale.checkpoint.folder import list_checkpoints, step_of
    from bd3_scale.checkpoint.manifest import MANIFEST

    if (path / MANIFEST).is_file() or step_of(path) is not None:
        return [path]
    checkpoints = list_checkpoints(path / "checkpoints")
    if not checkpoints:
        raise ValueError(f"{path} is neither a checkpoint nor a run directory with one in {path / 'checkpoints'}")
    return checkpoints
