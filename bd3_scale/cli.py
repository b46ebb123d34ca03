"""The command line `bd3-scale`. What a command needs is imported when it runs, so that `--help` answers at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bd3_scale.convert.commands import app as convert_app
from bd3_scale.launch.commands import app as launch_app
from bd3_scale.launch.commands import follow_run
from bd3_scale.observe.progress import Bar
from bd3_scale.observe.warnings import quieten_libraries

app = typer.Typer(
    help="Pretrain, evaluate and sample block diffusion language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
data_app = typer.Typer(help="Tokenise text and write it as shards.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(convert_app, name="convert")
app.add_typer(launch_app)

Sources = Annotated[
    list[Path], typer.Argument(help=".txt and .jsonl files (field `text`), also .gz or .zst, and folders of them.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _is_rank_zero() -> bool:
    return os.environ.get("RANK", "0") == "0"


def main() -> None:
    """Entry point: a person's mistake ends in one `error:` line and exit code 2; BD3_DEBUG=1 shows the traceback."""
    quieten_libraries()
    try:
        app()
    except (ValueError, OSError) as error:
        if os.environ.get("BD3_DEBUG"):
            raise
        Console(stderr=True, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), str(error)))
        sys.exit(2)


@data_app.command(epilog="Example: bd3-scale data tokenizer corpus/ --out tokenizers/mine --vocab-size 4096")
def tokenizer(
    sources: Sources,
    out: Annotated[Path, typer.Option(help="New folder for the tokeniser.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens, the 256 bytes and the end of document included.")] = 4096,
) -> None:
    """Train a byte-level BPE tokeniser."""
    from bd3_scale.data.tokenizer import train_tokenizer

    trained = train_tokenizer(sources, out, vocab_size)
    typer.echo(f"{out}: {trained.vocabulary.size} ids with the mask, hash {trained.hash[:12]}")


@data_app.command(epilog="Example: bd3-scale data prepare corpus/ --out shards --tokenizer bytes --seq-len 256")
def prepare(
    sources: Sources,
    out: Annotated[Path, typer.Option(help="New folder for the shards.")],
    tokenizer: Annotated[str, typer.Option(help="`bytes`, a tokenizer.json, or a folder that holds one.")],
    seq_len: Annotated[int, typer.Option(help="Tokens a sequence.")],
    document_multiple: Annotated[int, typer.Option(help="Documents are padded to a multiple of so many tokens.")] = 32,
    holdout: Annotated[float, typer.Option(help="Share of the documents held out for evaluation.")] = 0.05,
    validation: Annotated[
        list[Path] | None, typer.Option(help="Held-out files or folders, in place of --holdout; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides which documents are held out.")] = 1,
    workers: Annotated[int | None, typer.Option(help="Processes.", show_default="one a core")] = None,
    as_json: AsJson = False,
) -> None:
    """Tokenise and pack documents into training and validation shards."""
    from bd3_scale.data.prepare import prepare as prepare_shards
    from bd3_scale.data.tokenizer import load_tokenizer

    manifest = prepare_shards(
        sources,
        out,
        load_tokenizer(tokenizer),
        seq_len,
        document_multiple=document_multiple,
        holdout=holdout,
        validation=validation or (),
        seed=seed,
        workers=workers,
    )
    if as_json:
        typer.echo(manifest.model_dump_json())
        return
    table = Table("", "documents", "sequences", "tokens", "dropped tokens", title=f"{out}, {seq_len} tokens a sequence")
    for name, split in (("train", manifest.train), ("validation", manifest.validation)):
        if split is not None:
            counts = (split.documents, split.sequences, split.sequences * seq_len, split.dropped_tokens)
            table.add_row(name, *(f"{count:,}" for count in counts))
    Console().print(table)


@app.command(epilog="Example: bd3-scale train recipes/tiny.yaml optimizer.lr=1e-3 train.steps=200")
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Replace recipe values.")] = None,
) -> None:
    """Train a model; where the run directory holds a checkpoint, go on from it.

    Starts `launch.processes` processes on this machine, or joins a run where torchrun or SLURM set RANK and WORLD_SIZE.
    """
    _train(recipe, overrides or ())


@app.command(
    epilog="Example: bd3-scale adapt models/Qwen3-0.6B recipes/adapt-qwen3.yaml --text corpus/ run_dir=runs/qwen3-bd3"
)
def adapt(
    source: Annotated[Path, typer.Argument(help="Hugging Face folder of the model to begin with.")],
    recipe: Annotated[Path, typer.Argument(help="YAML file without a model section: the model is the source's.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Replace recipe values.")] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Files or folders to train on, where data.path is not prepared yet.")
    ] = None,
    validation: Annotated[list[Path] | None, typer.Option(help="Held-out files or folders of text.")] = None,
    mask_token: Annotated[
        str | None, typer.Option(help="An unused token that becomes the mask.", show_default="a new one")
    ] = None,
    prepare_only: Annotated[
        bool, typer.Option("--prepare-only", help="Import and prepare; `bd3-scale train RUN_DIR/adapt.yaml` goes on.")
    ] = False,
) -> None:
    """Make a block diffusion model of an autoregressive one: import it, prepare text with its tokeniser, train on.

    What is there already is not done again: repeat the command to go on.
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
            progress=bar.show,
            note=lambda text: typer.echo(f"note: {text}", err=True),
        )
    if prepare_only:
        typer.echo(f"prepared; go on with: bd3-scale train {adapted}")
        return
    _train(adapted, ())


def _train(recipe: Path, overrides: Sequence[str]) -> None:
    from bd3_scale.data.manifest import load_manifest
    from bd3_scale.recipe.checks import check_recipe, world_size_for_launch
    from bd3_scale.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    joins = {"RANK", "WORLD_SIZE"} <= os.environ.keys()
    world_size = int(os.environ["WORLD_SIZE"]) if joins else world_size_for_launch(loaded)
    # Twice, so that a broken rule is reported even where the data is not there yet.
    check_recipe(loaded, world_size)
    check_recipe(loaded, world_size, load_manifest(loaded.data.path, loaded.data.remote).document_multiple)
    if joins:
        from bd3_scale.train.main import main as train_here

        train_here(loaded)
        return
    from bd3_scale.launch.local import launch

    argv = [sys.executable, "-m", "bd3_scale.train", str(recipe), *overrides]
    threads = loaded.launch.threads or max(1, len(os.sched_getaffinity(0)) // world_size)
    raise typer.Exit(launch(argv, world_size, threads, loaded.run_path / "logs"))


@app.command(
    epilog="Example: bd3-scale submit recipes/paper-110m.yaml --profile mysite --nodes 2 run_dir=/shared/runs/paper"
)
def submit(
    recipe: Annotated[Path, typer.Argument(help="YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Replace recipe values.")] = None,
    profile: Annotated[str, typer.Option(help="A site in cluster/profiles, or a YAML file.")] = "default",
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the site.")] = 1,
    time_limit: Annotated[
        str | None, typer.Option("--time", help="Such as 1-00:00:00.", show_default="the profile's")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch script and do nothing.")] = False,
    test_only: Annotated[bool, typer.Option("--test-only", help="Ask SLURM whether and when it would start.")] = False,
    chain: Annotated[int, typer.Option(min=0, help="Jobs one after the other, where a site forbids requeueing.")] = 0,
    dependency: Annotated[str | None, typer.Option(help="As sbatch takes it, such as afterok:123.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="A node to leave out; may be repeated.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show what the run says until it ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Submit a run to SLURM; it resumes by itself after time limits, pre-emption, crashes and hangs."""
    import json

    from bd3_scale.data.manifest import load_manifest
    from bd3_scale.launch.job import check_job, script
    from bd3_scale.launch.submit import ask_slurm, make_job
    from bd3_scale.launch.submit import submit as submit_job

    job = make_job(
        recipe,
        overrides or (),
        profile=profile,
        nodes=nodes,
        time_limit=time_limit,
        chain=chain,
        dependency=dependency,
        exclude=exclude or (),
    )
    if dry_run:
        typer.echo(script(job), nl=False)
        return
    # Again, now that the data must be there.
    multiple = load_manifest(job.recipe.data.path, job.recipe.data.remote).document_multiple
    check_job(job.recipe, job.profile, nodes, multiple, job.run_dir)
    if test_only:
        typer.echo(ask_slurm(job))
        return
    jobs = submit_job(job)
    if as_json:
        typer.echo(json.dumps({"jobs": jobs, "run_dir": str(job.run_dir), "script": str(job.folder / "job.sh")}))
    else:
        typer.echo(f"submitted as job {', '.join(jobs)}: {nodes} nodes x {job.profile.processes} ranks, {job.run_dir}")
        typer.echo(f"bd3-scale status {job.run_dir}")
    if follow:
        follow_run(job.run_dir)


@app.command(epilog="Example: bd3-scale evaluate runs/books --text ptb=ptb-test.txt --text notes.jsonl --block-size 4")
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a run directory for its newest one.")],
    data: Annotated[str | None, typer.Option(help="Prepared data.", show_default="what the run trained on")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text in place of held-out data, once or more: PATH as it stands, or SET=PATH, see above."),
    ] = None,
    block_size: Annotated[
        list[int] | None, typer.Option(min=1, help="Once or more.", show_default="that of the training")
    ] = None,
    sequences: Annotated[int | None, typer.Option(help="The first so many.", show_default="all")] = None,
    draws: Annotated[int, typer.Option(help="Noise draws a sequence; block size 1 is exact and takes one.")] = 4,
    intervals: Annotated[
        bool, typer.Option("--intervals", help="Also the training loss's variance under clipped mask-rate intervals.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity on held-out or other text: a bound from the NELBO, exact at block size 1.

    A sequence has as many tokens as in training and begins without context.
    Documents do not see each other; their end counts, what pads them does not.

    SET is ptb, wikitext2, lm1b, lambada, ag_news, pubmed or arxiv: a tokenised
    corpus that is put back into plain text, whose bytes are counted.
    """
    from bd3_scale.checkpoint.store import resolve_checkpoint
    from bd3_scale.evaluate.checkpoint import evaluate_checkpoint
    from bd3_scale.evaluate.sets import NamedText
    from bd3_scale.evaluate.tables import as_json_text, show_evaluations

    texts = [NamedText.parse(argument) for argument in text or ()]
    with Bar("evaluating") as bar:
        found = evaluate_checkpoint(
            resolve_checkpoint(checkpoint),
            data_path=data,
            texts=texts,
            block_sizes=block_size or (),
            sequences=sequences,
            draws=draws,
            intervals=intervals,
            progress=bar.show,
        )
    if not _is_rank_zero():
        return
    for name, count in {(result.text, result.trained_on) for result in found if not result.own}:
        if count is None:
            typer.echo(f"{name}: no hashes of the training documents are at hand to tell an overlap by", err=True)
        elif count:
            typer.echo(f"warning: the training had {count} documents of {name}, too: it measures memory", err=True)
    if as_json:
        typer.echo(as_json_text(found))
        return
    show_evaluations(found)


@app.command(epilog="Example: bd3-scale harness runs/mine --tasks hellaswag,lambada_openai --limit 200")
def harness(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a run directory for its newest one.")],
    tasks: Annotated[str, typer.Option(help="Names of tasks, with commas between; `lm_eval ls tasks` lists them.")],
    include: Annotated[str | None, typer.Option(help="Folder with YAML files of further tasks.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Documents a task, for a first look.", show_default="all")
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Noise draws a continuation; block size 1 takes one.")] = 8,
    as_json: AsJson = False,
) -> None:
    """Run tasks of lm-evaluation-harness: choices by the NELBO, text by greedy generation."""
    import json

    from bd3_scale.checkpoint.store import resolve_checkpoint
    from bd3_scale.evaluate.harness import evaluate_tasks, show_results

    found = evaluate_tasks(resolve_checkpoint(checkpoint), tasks.split(","), folder=include, limit=limit, draws=draws)
    if as_json:
        typer.echo(json.dumps(found["results"]))
    else:
        show_results(found)


@app.command(epilog="Example: bd3-scale generate runs/quickstart --prompt 'def main(' --temperature 0.7 --watch")
def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a run directory for its newest one.")],
    prompt: Annotated[list[str] | None, typer.Option(help="Text to go on from, once or more.")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="One a line, or a .jsonl with `prompt`.")] = None,
    infill: Annotated[bool, typer.Option("--infill", help="Each [MASK] of a prompt is a gap of one token.")] = False,
    max_new_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens at the most; EOS ends the text before. 0: only fill gaps.")
    ] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Only the k most likely tokens.", show_default="all")] = None,
    top_p: Annotated[float, typer.Option(help="Only the nucleus: the fewest tokens that make this share.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends the text, once or more.")] = None,
    min_entropy: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Stop where the last 256 tokens have fewer nats.",
            show_default="4; for bytes 0.75 of the held-out median",
        ),
    ] = None,
    unmasking: Annotated[
        Literal["first-hitting", "ancestral", "static", "dynamic", "entropy"],
        typer.Option(
            help="What a pass unmasks: one token; each by chance; the most confident; also all above a threshold; "
            "the surest up to a sum of entropies."
        ),
    ] = "first-hitting",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Ancestral, static, dynamic: passes a block.", show_default="one a token")
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Dynamic: a probability; entropy: nats.", show_default="0.9; 0.1"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Text i depends on seed + i and its prompt alone.")] = 0,
    watch: Annotated[bool, typer.Option("--watch", help="Show the text as it loses its masks.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a line.")] = False,
) -> None:
    """Generate text block by block.

    Where a text grows beyond the sequences of the training, a block sees the
    last of them: a sliding window, told with the result.
    """
    import dataclasses
    import json

    from bd3_scale.checkpoint.store import resolve_checkpoint
    from bd3_scale.evaluate.writing import read_prompts, write_texts
    from bd3_scale.observe.denoising import DenoisingView

    prompts = [*(prompt or []), *(read_prompts(prompts_file) if prompts_file else [])] or [""]
    with Bar("generating") as bar, DenoisingView(watch and _is_rank_zero()) as view:
        written = list(
            write_texts(
                resolve_checkpoint(checkpoint),
                prompts,
                infill=infill,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                stop=stop or (),
                min_entropy=min_entropy,
                unmasking=unmasking,
                steps=steps,
                threshold=threshold,
                seed=seed,
                progress=bar.show,
                watch=view.show if watch else None,
            )
        )
    if not _is_rank_zero():
        return
    if as_json:
        for text in written:
            typer.echo(json.dumps(dataclasses.asdict(text)))
        return
    console = Console(highlight=False)
    for text in written:
        console.print(Text("" if infill else text.prompt, style="bold"), Text(text.text), sep="")
        window = f"; a block sees {text.window} tokens" if text.window else ""
        console.print(
            f"{len(text.tokens)} tokens, {text.nfe} denoising and {text.cache_passes} cache passes, ended by "
            f"{text.stopped_by}{window}",
            style="dim",
        )
    tokens, seconds = sum(len(text.tokens) for text in written), {text.seconds for text in written}
    console.print(f"{tokens / sum(seconds):.0f} tokens/s", style="dim")


@app.command(epilog="Example: bd3-scale doctor --json")
def doctor(as_json: AsJson = False) -> None:
    """Report versions, processors and optional accelerations of this machine."""
    import dataclasses
    import json

    from bd3_scale.observe.environment import read_environment

    environment = read_environment()
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(environment)))
        return
    console = Console()
    versions = Table("package", "version", title="Versions")
    for name, version in environment.versions.items():
        versions.add_row(name, version or "not installed")
    hardware = Table("processor", "", title="Hardware")
    hardware.add_row("CPU", f"{environment.cpu}, {environment.cpu_cores} cores for this process")
    for gpu in environment.gpus:
        hardware.add_row("GPU", f"{gpu.name}, {gpu.memory_gib} GiB, compute capability {gpu.compute_capability}")
    if not environment.gpus:
        hardware.add_row("GPU", "none" if environment.cuda else "none, and torch was built without CUDA")
    accelerations = Table("acceleration", "found", "used", "", title="Optional accelerations")
    for a in environment.accelerations:
        accelerations.add_row(a.name, "yes" if a.found else "no", "yes" if a.used else "no", a.note)
    console.print(versions, hardware, accelerations)
