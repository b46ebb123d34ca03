"""`bd3-scale data tokenizer` and `prepare`; what a command needs is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from bd3_scale.observe.console import Console, put, say

app = typer.Typer(help="Tokenise text and write it as shards.", no_args_is_help=True)

Sources = Annotated[
    list[Path],
    typer.Argument(help="Files such as .txt and .jsonl, also .gz or .zst, and folders of them; links are followed."),
]
Field = Annotated[
    str | None, typer.Option(help="Of a JSON line, such as document.body.", show_default="text; messages")
]
Bos = Annotated[
    bool | None,
    typer.Option("--bos/--no-bos", help="Texts begin with BOS.", show_default="as the tokeniser's template"),
]
OnErrorOption = Annotated[
    Literal["stop", "skip"], typer.Option(help="Of a line or file that cannot be read; skipped ones are counted.")
]
MaxDocument = Annotated[int, typer.Option("--max-document-mib", min=1, help="Of one document, unpacked.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command(epilog="Example: bd3-scale data tokenizer corpus/ --out tokenizers/mine --vocab-size 4096")
def tokenizer(
    sources: Sources,
    out: Annotated[Path, typer.Option(help="New folder for the tokeniser.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens, the 256 bytes and the end of document included.")] = 4096,
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
    field: Field = None,
    on_error: OnErrorOption = "stop",
    max_document: MaxDocument = 128,
    bos: Bos = None,
    parse_special: Annotated[
        bool,
        typer.Option("--parse-special", help="Special tokens that a document spells are these tokens, not plain text."),
    ] = False,
    messages: Annotated[
        bool,
        typer.Option("--messages", help="Lines hold conversations, lists `messages`: only answers are trained on."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Tokenise and pack documents into training and validation shards.

    Conversations become text by the chat template beside the tokeniser; special tokens in it are parsed.
    """
    from bd3_scale.data.chat import ChatTemplate
    from bd3_scale.data.prepare import prepare as prepare_shards
    from bd3_scale.data.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    if bos is not None:
        loaded = loaded.with_bos_switch(bos)
    manifest = prepare_shards(
        sources,
        out,
        loaded,
        seq_len,
        document_multiple=document_multiple,
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
    if as_json:
        put(manifest.without_shards())
        return
    table = Table("", "documents", "sequences", "tokens", "dropped tokens", title=f"{out}, {seq_len} tokens a sequence")
    for name, split in (("train", manifest.train), ("validation", manifest.validation)):
        if split is not None:
            counts = (split.documents, split.sequences, split.sequences * seq_len, split.dropped_tokens)
            table.add_row(name, *(f"{count:,}" for count in counts))
    Console().print(table)
