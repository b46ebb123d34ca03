"""Run the command line `bd3-scale`. A command imports what it needs when it runs: `--help` answers at once."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from bd3_scale.checkpoint.commands import app as checkpoint_app
from bd3_scale.convert.commands import app as convert_app
from bd3_scale.data.commands import Bos
from bd3_scale.data.commands import app as data_app
from bd3_scale.evaluate.commands import app as evaluate_app
from bd3_scale.launch.commands import app as launch_app
from bd3_scale.launch.commands import follow_run
from bd3_scale.launch.run_commands import app as run_app
from bd3_scale.observe.console import Console, put, say, styled
from bd3_scale.observe.libraries import quieten_libraries
from bd3_scale.observe.progress import Bar
from bd3_scale.plan.commands import app as plan_app
from bd3_scale.project.commands import app as project_app
from bd3_scale.registry import import_plugins
from bd3_scale.resilience.output import (
    flush_results,
    label_rank_output,
    rank_log,
    reserve_standard_descriptors,
    survive_broken_streams,
)
from bd3_scale.resilience.terminal import clean_diagnostics, tell
from bd3_scale.serve.commands import app as serve_app

app = typer.Typer(
    help="Pretrain, evaluate and sample block diffusion language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(data_app, name="data")
app.add_typer(convert_app, name="convert")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(evaluate_app)
app.add_typer(launch_app)
app.add_typer(plan_app)
app.add_typer(project_app)
app.add_typer(run_app)
app.add_typer(serve_app)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def main() -> None:
    """Run the command line. A user's mistake ends in an `error:` line and exit code 2 (BD3_DEBUG=1: a traceback)."""
    reserve_standard_descriptors()
    quieten_libraries()
    clean_diagnostics()
    survive_broken_streams("stderr")
    try:
        _run()
    except BrokenPipeError:
        # The reader of stdout closed it, as `head` does when it has its lines.
        sys.exit(1)
    except (ValueError, OSError, MemoryError) as error:
        if os.environ.get("BD3_DEBUG"):
            raise
        message = str(error) or "there is too little memory for this"
        Console(stderr=True, soft_wrap=True).print(styled(("error: ", "bold red"), message))
        sys.exit(2)


def _run() -> None:
    """Run the command. It succeeds only once its output is written, also to a full disk or a closed pipe."""
    try:
        app()
    except SystemExit:
        flush_results()
        raise


@app.callback()
def import_named_plugins(
    context: typer.Context,
    plugin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE",
            envvar="BD3_SCALE_PLUGINS",
            help="Import a module that adds schedules, objectives, unmasking rules and the like; may be repeated. A "
            "recipe names its own under `plugins`.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Import the plug-ins of the command line and the environment; `context.obj` keeps their names for the ranks."""
    context.obj = [module for text in plugin or () for module in re.split(r"[\s,]+", text) if module]
    import_plugins(context.obj)


@app.command(epilog="Example: bd3-scale quickstart")
def quickstart() -> None:
    """Train, kill, resume, measure and sample a small model on this machine, in about four minutes.

    It replaces `data/quickstart*` and `runs/quickstart` in the current folder.
    """
    from bd3_scale.quickstart import quickstart as run_quickstart

    run_quickstart()


@app.command(epilog="Example: bd3-scale train recipes/quickstart.yaml optimizer.lr=1e-3 train.steps=200")
def train(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="YAML file, or a name of `bd3-scale recipe list`.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Replace recipe values.")] = None,
    inject: Annotated[
        str,
        typer.Option(
            help="Inject faults, to practise recovery, such as 'kill@step:step=5,rank=1; full@save.write'.",
            show_default=False,
        ),
    ] = "",
) -> None:
    """Train a model; where the run directory holds a checkpoint, resume from it.

    It starts `launch.processes` processes here, or is one rank where torchrun or SLURM set RANK and WORLD_SIZE.
    """
    _train(recipe, overrides or (), context.obj, inject)


@app.command(
    epilog="Example: bd3-scale adapt models/Qwen3-0.6B recipes/adapt-qwen3.yaml --text corpus/ run_dir=runs/qwen3-bd3"
)
def adapt(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(help="Hugging Face folder of the model to begin with.")],
    recipe: Annotated[
        Path,
        typer.Argument(
            help="YAML file, or a name of `bd3-scale recipe list`, without a model section: the model is the source's."
        ),
    ],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Replace recipe values.")] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Files or folders to train on, where data.path is not prepared yet.")
    ] = None,
    validation: Annotated[list[Path] | None, typer.Option(help="Held-out files or folders of text.")] = None,
    mask_token: Annotated[
        str | None, typer.Option(help="An unused token that becomes the mask.", show_default="a new one")
    ] = None,
    bos: Bos = None,
    prepare_only: Annotated[
        bool,
        typer.Option("--prepare-only", help="Import and prepare only; `bd3-scale train RUN_DIR/adapt.yaml` trains."),
    ] = False,
) -> None:
    """Adapt an autoregressive model to block diffusion: import it, prepare text with its tokeniser, train on.

    Finished parts are not repeated: run the same command again to continue.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "adapt imports and prepares in one process: run it without a launcher and with --prepare-only, then start "
            "all processes on `bd3-scale train RUN_DIR/adapt.yaml`"
        )
    from bd3_scale.convert.adapt import prepare_adaptation

    with Bar("importing", unit="bytes") as bar:
        adapted = prepare_adaptation(
            source,
            recipe,
            overrides or (),
            text=text or (),
            validation=validation or (),
            mask_token=mask_token,
            bos=bos,
            plugins=context.obj,
            progress=bar.show,
            note=lambda text: tell(f"note: {text}"),
        )
    if prepare_only:
        say(f"prepared; continue with: bd3-scale train {adapted}")
        return
    _train(adapted, (), context.obj)


@app.command(epilog="Example: bd3-scale replay runs/mine --step 1200")
def replay(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="Run directory.", metavar="RUN")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Replace recipe values.")] = None,
    step: Annotated[
        int | None, typer.Option(min=1, help="Step, counted from 1.", show_default="the last one in events.jsonl")
    ] = None,
) -> None:
    """Compute one step again from the checkpoint before it, without writing anything.

    RUN/events.jsonl has the steps with a loss spike or gradients that are not finite, and their sequences. The output
    is one JSON object; `same` tells whether loss and gradient norm equal the recorded ones bit by bit.
    """
    recipe = run / "recipe.yaml"
    if not recipe.is_file():
        raise ValueError(f"{run} is no run directory: it has no recipe.yaml")
    if step is None:
        from bd3_scale.observe.metrics import EVENTS_FILE, last_event

        step = last_event(run)
        if step is None:
            raise ValueError(f"{run} has no step that stood out ({EVENTS_FILE}): name one with --step")
    _train(recipe, [f"run_dir={run}", *(overrides or ())], context.obj, options=[f"--replay={step}"])


def _train(
    recipe: Path, overrides: Sequence[str], plugins: Sequence[str], inject: str = "", options: Sequence[str] = ()
) -> None:
    """Check a recipe, and train it: in this process under a launcher, else in new processes."""
    from bd3_scale.data.manifest import load_sources
    from bd3_scale.recipe.checks import check_against_data, check_recipe, world_size_for_launch
    from bd3_scale.recipe.load import load_recipe, resolved_yaml, with_plugins
    from bd3_scale.resilience import faults

    faults.parse_faults(inject)
    joins = {"RANK", "WORLD_SIZE"} <= os.environ.keys()
    if joins and options:
        raise ValueError("replay starts its processes itself: run it without a launcher")
    loaded = load_recipe(recipe, overrides)
    if not options:
        # Before plug-ins import libraries: some libraries keep a reference to the streams that they find.
        survive_broken_streams("stdout", "stderr", log=rank_log(loaded.run_path))
    loaded = with_plugins(loaded, plugins)
    # A value that a shell has exported must not inject faults into this run.
    os.environ[faults.VARIABLE] = inject
    world_size = int(os.environ["WORLD_SIZE"]) if joins else world_size_for_launch(loaded)
    check_recipe(loaded, world_size)
    check_against_data(loaded, world_size, load_sources(loaded.data).document_multiple)
    if joins:
        from bd3_scale.train.main import main as train_here

        label_rank_output(loaded.run_path)
        train_here(loaded)
        return
    from bd3_scale.launch.local import launch

    argv = [sys.executable, "-m", "bd3_scale.train", *options]
    threads = loaded.launch.threads or _default_threads(world_size)
    deadlines = loaded.launch.deadlines.by_phase(loaded.data)
    # A replay writes nothing into the run directory.
    logs = None if options else loaded.run_path / "logs"
    # Ranks see their own command line alone.
    os.environ["BD3_SCALE_COMMAND"] = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    if not options:
        survive_broken_streams("stdout", "stderr", log=rank_log(loaded.run_path), label="launcher", copies=True)
    raise typer.Exit(launch(argv, world_size, threads, logs, deadlines=deadlines, recipe=resolved_yaml(loaded)))


def _default_threads(processes: int) -> int:
    """Return the CPU threads of a process: $OMP_NUM_THREADS where it is set, or its share of the cores."""
    inherited = os.environ.get("OMP_NUM_THREADS", "")
    return (
        int(inherited)
        if inherited.isdecimal() and int(inherited)
        else max(1, len(os.sched_getaffinity(0)) // processes)
    )


@app.command(
    epilog="Example: bd3-scale submit recipes/paper-110m.yaml --profile mysite --nodes 2 run_dir=/shared/runs/paper"
)
def submit(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="YAML file, or a name of `bd3-scale recipe list`.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Replace recipe values.")] = None,
    profile: Annotated[str, typer.Option(help="A site in cluster/profiles, or a YAML file.")] = "default",
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the site.")] = 1,
    time_limit: Annotated[
        str | None, typer.Option("--time", help="Time limit, such as 1-00:00:00.", show_default="the profile's")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch script and do nothing.")] = False,
    test_only: Annotated[bool, typer.Option("--test-only", help="Ask SLURM whether and when it would start.")] = False,
    chain: Annotated[
        int, typer.Option(min=0, help="Jobs to submit one after the other, where a site forbids requeueing.")
    ] = 0,
    dependency: Annotated[str | None, typer.Option(help="Dependency for sbatch, such as afterok:123.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Node to leave out; may be repeated.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show the supervisor's log until the run ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Submit a run to SLURM; it resumes by itself after time limits, pre-emption, crashes and hangs."""
    import json

    from bd3_scale.data.manifest import load_sources
    from bd3_scale.launch.job import script
    from bd3_scale.launch.submit import ask_slurm, make_job
    from bd3_scale.launch.submit import submit as submit_job
    from bd3_scale.recipe.checks import check_against_data

    job = make_job(
        recipe,
        overrides or (),
        profile=profile,
        nodes=nodes,
        time_limit=time_limit,
        chain=chain,
        dependency=dependency,
        exclude=exclude or (),
        plugins=context.obj,
    )
    if dry_run:
        put(script(job), end="")
        return
    # A dry run needs no data; a submission does.
    multiple = load_sources(job.recipe.data).document_multiple
    check_against_data(job.recipe, nodes * job.profile.processes, multiple)
    if test_only:
        say(ask_slurm(script(job)))
        return
    jobs = submit_job(job)
    if as_json:
        put(json.dumps({"jobs": jobs, "run_dir": str(job.run_dir), "script": str(job.folder / "job.sh")}))
    else:
        say(f"submitted as job {', '.join(jobs)}: {nodes} nodes x {job.profile.processes} ranks, {job.run_dir}")
        say(f"bd3-scale status {job.run_dir}")
    if follow:
        follow_run(job.run_dir)
