"""Provide `bd3-scale data tokenizer`, `prepare`, `import` and `mixture`; heavy imports happen when a command runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from bd3_scale.data.commands_inspect import app as inspection
from bd3_scale.observe.console import Console, put, say
from bd3_scale.resilience.terminal import tell

if TYPE_CHECKING:
    from bd3_scale.data.manifest import Manifest
    from bd3_scale.data.prepare import Preparation

app = typer.Typer(help="Tokenise text and write it as shards, inspect them, mix them.", no_args_is_help=True)
app.add_typer(inspection)

Sources = Annotated[
    list[str],
    typer.Argument(
        help="Files (.txt, .jsonl and .json, also .gz or .zst; .parquet, .arrow), folders of them, and URLs such as "
        "s3://bucket/corpus; links are followed."
    ),
]
Out = Annotated[Path, typer.Option(help="New folder for the shards.")]
SeqLen = Annotated[int | None, typer.Option(help="Tokens a sequence.", show_default="the recipe's")]
RecipeFile = Annotated[
    Path | None, typer.Option(help="Recipe of the training; its lengths and block sizes decide what fits.")
]
Multiple = Annotated[
    int | None,
    typer.Option(
        help="Documents are padded to a multiple of this many tokens.",
        show_default="the smallest that suits the recipe's block sizes; without a recipe 32",
    ),
]
PackingOption = Annotated[
    Literal["concatenate", "best-fit"], typer.Option(help="best-fit: no document is cut that fits into a sequence.")
]
Holdout = Annotated[float, typer.Option(help="Share of the documents held out for evaluation.")]
Seed = Annotated[int, typer.Option(help="Decides which documents are held out.")]
Workers = Annotated[int | None, typer.Option(help="Processes.", show_default="one a core")]
Field = Annotated[
    str | None, typer.Option(help="Field of a JSON line or row, such as document.body.", show_default="text; messages")
]
Bos = Annotated[
    bool | None,
    typer.Option("--bos/--no-bos", help="Texts begin with BOS.", show_default="as the tokeniser's template"),
]
OnErrorOption = Annotated[
    Literal["stop", "skip"], typer.Option(help="For lines and files that cannot be read; skipped ones are counted.")
]
MaxDocument = Annotated[int, typer.Option("--max-document-mib", min=1, help="Limit of one document, unpacked.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command(epilog="Example: bd3-scale data tokenizer corpus/ --out tokenizers/mine --vocab-size 4096")
def tokenizer(
    sources: Sources,
    out: Annotated[Path, typer.Option(help="New folder for the tokeniser.")],
    vocab_size: Annotated[int, typer.Option(help="Number of tokens, with 256 bytes and the end of document.")] = 4096,
    field: Field = None,
    on_error: OnErrorOption = "stop",
    max_document: MaxDocument = 128,
) -> None:
    """Train a byte-level BPE tokeniser."""
    from bd3_scale.data.tokenizer import train_tokenizer

    trained = train_tokenizer(
        sources, out, vocab_size, field=field or "text", on_error=on_error, max_document_bytes=max_document << 20
    )
    say(f"{out}: {trained.vocabulary.size} ids with the mask, hash {trained.hash[:12]}")


@app.command(epilog="Example: bd3-scale data prepare corpus/ --out shards --tokenizer bytes --seq-len 256")
def prepare(
    context: typer.Context,
    sources: Sources,
    out: Out,
    tokenizer: Annotated[str, typer.Option(help="`bytes`, a tokenizer.json, or a folder that holds one.")],
    seq_len: SeqLen = None,
    recipe: RecipeFile = None,
    document_multiple: Multiple = None,
    packing: PackingOption = "concatenate",
    holdout: Holdout = 0.05,
    validation: Annotated[
        list[str] | None, typer.Option(help="Held-out files or folders, in place of --holdout; may be repeated.")
    ] = None,
    seed: Seed = 1,
    workers: Workers = None,
    field: Field = None,
    on_error: OnErrorOption = "stop",
    max_document: MaxDocument = 128,
    bos: Bos = None,
    parse_special: Annotated[
        bool,
        typer.Option("--parse-special", help="Parse special tokens that a document spells; default: plain text."),
    ] = False,
    messages: Annotated[
        bool,
        typer.Option("--messages", help="Lines or rows hold conversations, `messages`: only answers are trained on."),
    ] = False,
    tasks: Annotated[
        int | None, typer.Option(help="Divide the work into so many shares, for --task or --slurm.", show_default=False)
    ] = None,
    task: Annotated[
        int | None,
        typer.Option(help="Do this share, from 0; the command without --tasks does what is missing and merges."),
    ] = None,
    slurm: Annotated[
        str | None,
        typer.Option(
            metavar="PROFILE",
            help="Submit missing work as an array of --tasks jobs to a site in cluster/profiles, or a YAML file.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tokenise and pack documents into training and validation shards.

    Conversations become text by the tokeniser's chat template; its special tokens are parsed. Finished work stays in
    OUT.tasks until everything is done: after an interruption, repeat the command.
    """
    if (tasks is None) != (task is None and slurm is None) or (task is not None and slurm is not None):
        raise ValueError("give --tasks together with --task, to do one share, or with --slurm, to submit all shares")
    from bd3_scale.data.chat import ChatTemplate

    preparation = _preparation(
        sources,
        out,
        tokenizer,
        bos,
        _lengths(recipe, seq_len, document_multiple),
        packing=packing,
        holdout=holdout,
        validation=validation or (),
        seed=seed,
        workers=workers,
        field=field,
        on_error=on_error,
        parse_special=parse_special,
        chat=ChatTemplate(Path(tokenizer)) if messages else None,
        max_document_bytes=max_document << 20,
    )
    if tasks is not None:
        _prepare_share(preparation, tasks, task, slurm, context, as_json)
        return
    _show(preparation.finish(), out, as_json)


@app.command(
    "import",
    epilog="Example: bd3-scale data import corpus_text_document --format megatron --tokenizer gpt2/ --out shards "
    "--seq-len 1024",
)
def import_tokens(
    sources: Annotated[
        list[str], typer.Argument(help="Folders of MDS with an index.json, or Megatron's files, without .bin and .idx.")
    ],
    kind: Annotated[
        Literal["mds", "mds-documents", "megatron"],
        typer.Option("--format", help="mds: documents may span samples; mds-documents: each sample is a document."),
    ],
    tokenizer: Annotated[str, typer.Option(help="The tokeniser of the ids: a tokenizer.json, or its folder.")],
    out: Out,
    seq_len: SeqLen = None,
    recipe: RecipeFile = None,
    document_multiple: Multiple = None,
    packing: PackingOption = "concatenate",
    holdout: Holdout = 0.05,
    validation: Annotated[
        list[str] | None, typer.Option(help="Sources to hold out, in place of --holdout; may be repeated.")
    ] = None,
    seed: Seed = 1,
    workers: Workers = None,
    bos: Bos = None,
    as_json: AsJson = False,
) -> None:
    """Pack documents that other programs tokenised: MosaicML Foundry's MDS, or Megatron's .bin and .idx.

    Documents then begin and end as those of `prepare` do, whatever separated them before.
    """
    preparation = _preparation(
        sources,
        out,
        tokenizer,
        bos,
        _lengths(recipe, seq_len, document_multiple),
        packing=packing,
        holdout=holdout,
        validation=validation or (),
        seed=seed,
        workers=workers,
        tokens=kind,
    )
    _show(preparation.finish(), out, as_json)


def _preparation(
    sources: list[str], out: Path, tokenizer: str, bos: bool | None, lengths: tuple[int, int], **options: Any
) -> Preparation:
    from bd3_scale.data.prepare import Preparation
    from bd3_scale.data.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    if bos is not None:
        loaded = loaded.with_bos_switch(bos)
    seq_len, document_multiple = lengths
    return Preparation(sources, out, loaded, seq_len, document_multiple=document_multiple, **options)


def _lengths(recipe: Path | None, seq_len: int | None, document_multiple: int | None) -> tuple[int, int]:
    """Return sequence length and document multiple: the options, else those of the recipe, else the defaults."""
    from bd3_scale.data.prepare import DOCUMENT_MULTIPLE
    from bd3_scale.recipe.load import load_recipe
    from bd3_scale.recipe.preparation import preparation

    if recipe is not None:
        return preparation(load_recipe(recipe), seq_len, document_multiple)
    if seq_len is None:
        raise ValueError("the length of a sequence is missing: give --seq-len, or --recipe")
    return seq_len, DOCUMENT_MULTIPLE if document_multiple is None else document_multiple


def _show(manifest: Manifest, out: Path, as_json: bool) -> None:
    from bd3_scale.data.stored import StoredData
    from bd3_scale.data.waste import waste_note

    if note := waste_note(StoredData(str(out))):
        tell(f"note: {note}")
    if as_json:
        put(manifest.without_shards())
        return
    seq_len = manifest.seq_len
    table = Table("", "documents", "sequences", "tokens", "dropped tokens", title=f"{out}, {seq_len} tokens a sequence")
    for name, split in (("train", manifest.train), ("validation", manifest.validation)):
        if split is not None:
            counts = (split.documents, split.sequences, split.sequences * seq_len, split.dropped_tokens)
            table.add_row(name, *(f"{count:,}" for count in counts))
    Console().print(table)


def _prepare_share(
    preparation: Preparation, tasks: int, task: int | None, slurm: str | None, context: typer.Context, as_json: bool
) -> None:
    """Do one share of the work, or submit all shares to SLURM."""
    if slurm is not None:
        from bd3_scale.data.submit import submit

        arguments = _arguments(context, without={"tasks", "task", "slurm"})
        jobs = submit(preparation, arguments, profile=slurm, shares=tasks, plugins=context.obj or ())
        if as_json:
            put(json.dumps({"jobs": jobs, "logs": str(preparation.folder / "logs")}))
            return
        *array, merge = jobs
        say("".join(f"submitted as array {job}, and " for job in array) + f"job {merge} merges; their output:")
        say(f"{preparation.folder / 'logs'}; if one fails, repeat the command")
        return
    assert task is not None
    done = preparation.share(task, tasks)
    preparation.work(done)
    missing = preparation.missing()
    if as_json:
        put(json.dumps({"done": done, "missing": missing}))
    else:
        rest = f"{len(missing)} are missing" if missing else "none is missing: the command without --tasks merges them"
        say(f"share {task} of {tasks}: {len(done)} of {preparation.num_tasks} tasks done; of all, {rest}")


def _arguments(context: typer.Context, without: set[str]) -> list[str]:
    """Return the arguments that repeat a command, without some parameters and those that have their default value."""
    positional, options = [], []
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if parameter.name in without or value is None or value == parameter.get_default(context):
            continue
        values = value if isinstance(value, list | tuple) else [value]
        if parameter.param_type_name == "argument":
            positional += [f"./{each}" if str(each).startswith("-") else str(each) for each in values]
        elif isinstance(value, bool):
            options.append(parameter.opts[0] if value else parameter.secondary_opts[0])
        else:
            options += [f"{parameter.opts[0]}={each}" for each in values]
    return [*positional, *options]


@app.command(epilog="Example: bd3-scale data mixture recipes/mine.yaml")
def mixture(
    recipe: Annotated[Path, typer.Argument(help="YAML file with data.sources.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Replace recipe values.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show how many tokens and epochs of each source a run uses, by stage."""
    from bd3_scale.data.manifest import load_sources
    from bd3_scale.data.mixture import source_usage
    from bd3_scale.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    if not loaded.data.sources:
        raise ValueError(f"{recipe} has no data.sources: all sequences come from {loaded.data.path}")
    stages = source_usage(loaded, load_sources(loaded.data))
    if as_json:
        put(json.dumps(stages, indent=1))
        return
    table = Table("steps", "source", "share", "sequences", "tokens", "epochs", "epochs so far", title=loaded.name)
    for stage in stages:
        for name, use in stage["sources"].items():
            steps = f"{stage['first_step']:,}–{stage['last_step']:,}" * (name == next(iter(stage["sources"])))
            counts = (
                f"{use['sequences']:,}",
                f"{use['tokens']:,}",
                f"{use['epochs']:.3g}",
                f"{use['epochs_so_far']:.3g}",
            )
            table.add_row(steps, name, f"{use['share']:.1%}", *counts)
    Console().print(table)
