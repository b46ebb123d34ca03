"""Provide `bd3-scale data inspect|stats|sample|verify`; heavy imports happen when a command runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from bd3_scale.observe.console import Console, put, say, styled
from bd3_scale.observe.progress import Bar

app = typer.Typer()

Data = Annotated[
    list[str], typer.Argument(help="Folders or addresses of prepared data, or recipes.", metavar="DATA...")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
SplitOption = Annotated[
    Literal["train", "validation"] | None, typer.Option(help="The split.", show_default="all; for samples the first")
]


@app.command(epilog="Example: bd3-scale data inspect data/quickstart")
def inspect(data: Data, as_json: AsJson = False) -> None:
    """Describe prepared data: source, tokeniser, options and amounts.

    Reads no shard.
    """
    from bd3_scale.data.describe import description
    from bd3_scale.data.stored import stored_data

    descriptions = [description(one) for one in stored_data(data)]
    if as_json:
        put(json.dumps(descriptions))
        return
    for one in descriptions:
        Console(soft_wrap=True).print(styled((one["data"], "bold")))
        for what, value in _described(one):
            Console(soft_wrap=True).print(styled((f"  {what:<12}", "cyan"), value))
        Console().print(_table(list(one["splits"]), [_counts(split) for split in one["splits"].values()]))


def _counts(split: dict[str, Any]) -> dict[str, str]:
    keys = ("documents", "sequences", "tokens", "counted_tokens", "shown_tokens", "dropped_tokens", "shards")
    cells = {key.replace("_", " "): f"{split[key]:,}" for key in keys}
    return cells | {"MB": f"{split['bytes'] / 1e6:,.1f}"}


def _described(one: dict[str, Any]) -> list[tuple[str, str]]:
    vocabulary, special = one["vocabulary"], one["special_tokens"]
    names = ", ".join(f"{what} {name} ({vocabulary[f'{what}_id']})" for what, name in special.items())
    sources = [f"{source['path']} ({source['bytes']:,} bytes)" for source in one["sources"]]
    more = f", … ({len(sources):,} files)" if len(sources) > 3 else ""
    held_out = f"{one['holdout']:.1%} of the documents, seed {one['seed']}" if one["holdout"] else ""
    if "validation" in one["splits"] and not one["holdout"]:
        held_out = "files of their own"
    how = [word for word in ("messages", "parse_special") if one.get(word)]
    how += [f"field {one['field']}"] if one.get("field") else []
    lines = [
        ("sequences", f"of {one['seq_len']:,} tokens, packing {one['packing']}"),
        ("documents", ", ".join([f"padded to multiples of {one['document_multiple']} tokens", *how])),
        ("tokeniser", f"{vocabulary['size']:,} ids, hash {one['tokenizer_hash'][:12]}; {names}"),
        ("held out", held_out),
        ("left out", f"{one['empty_documents']:,} empty documents, {one.get('skipped_documents', 0):,} with errors"),
        ("sources", ", ".join(sources[:3]) + more),
    ]
    return [(name, value) for name, value in lines if value]


@app.command(epilog="Example: bd3-scale data stats data/quickstart")
def stats(data: Data, split: SplitOption = None, as_json: AsJson = False) -> None:
    """Show what the sequences consist of: lengths of documents, padding, and cut documents.

    Reads every shard.
    """
    from bd3_scale.data.statistics import statistics
    from bd3_scale.data.stored import stored_data
    from bd3_scale.data.waste import waste_note

    results = []
    for one in stored_data(data):
        here = []
        for name in (split,) if split else one.manifest.splits:
            with Bar(f"{one.place} {name}") as bar:
                here.append({"data": one.place, "split": name} | statistics(one, name, bar.show).summary())
        results += here
        if as_json:
            continue
        names = [one_split["split"] for one_split in here]
        Console(soft_wrap=True).print(styled((one.place, "bold")))
        Console().print(_table(names, [_measured(one_split) for one_split in here]))
        if note := waste_note(one):
            say(note)
    if as_json:
        put(json.dumps(results))


def _table(splits: Sequence[str], measured: Sequence[dict[str, str]]) -> Table:
    table = Table("", *splits)
    for name in measured[0]:
        table.add_row(name, *(one[name] for one in measured))
    return table


def _measured(one: dict[str, Any]) -> dict[str, str]:
    cells = {"sequences": f"{one['sequences']:,}", "tokens": f"{one['tokens']:,}"}
    for kind in ("counted", "shown", "padding", "filling"):
        cells[f"{kind} tokens"] = f"{one[f'{kind}_tokens'] / one['tokens']:.1%}"
    cells["cuts"] = f"{one['cuts']:,}"
    cells["documents that fit"] = f"{one['fitting_documents']:,}"
    cells["... and are cut"] = f"{one['fitting_documents_cut']:,}"
    for key, title in (("document_tokens", "tokens a document"), ("documents_a_sequence", "documents a sequence")):
        cells[f"{title}, mean"] = f"{one[key]['mean']:,.1f}"
        for name, label in (("0%", "least"), ("50%", "median"), ("90%", "90%"), ("100%", "most")):
            cells[f"{title}, {label}"] = f"{one[key][name]:,}"
    return cells


def _name(one: dict[str, Any]) -> str:
    return f"{one['data']} {one['split']}"


@app.command(epilog="Example: bd3-scale data sample data/quickstart --number 2")
def sample(
    data: Data,
    number: Annotated[int, typer.Option(min=1, help="How many sequences, drawn at random.")] = 3,
    split: SplitOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 1,
    ids: Annotated[
        list[int] | None, typer.Option("--id", min=0, help="Show this sequence, not random ones; may be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print sequences as text, with a line before each document; tokens that are never trained on are dim.

    Control characters of the text are printed as escapes, special tokens by their names.
    """
    from bd3_scale.data.describe import sampled
    from bd3_scale.data.stored import stored_data

    sequences = []
    for one in stored_data(data):
        name = next(iter(one.manifest.splits)) if split is None else split
        for sequence in sampled(one, name, number, seed, ids or ()):
            sequences.append({"data": one.place, "split": name} | sequence)
            if not as_json:
                _print_sample(sequences[-1])
    if as_json:
        put(json.dumps(sequences))


def _print_sample(sequence: dict[str, Any]) -> None:
    console = Console(soft_wrap=True)
    documents = [piece for piece in sequence["documents"] if piece["runs"]]
    count = f"{len(documents)} document{'s' * (len(documents) != 1)}"
    console.print(styled((f"━━ {_name(sequence)} {sequence['id']}: {count}", "bold magenta")))
    for place, document in enumerate(documents, 1):
        notes = [f"{document['tokens'] - document['padding']} tokens"]
        notes += [f"{document['padding']} of padding"] * bool(document["padding"])
        notes += ["cut"] * document["cut"]
        console.print(styled((f"── document {place}: {', '.join(notes)}", "cyan")))
        console.print(styled(*((run["text"], "dim" if run["shown"] else "") for run in document["runs"])))
    for filling in sequence["documents"][len(documents) :]:
        console.print(styled((f"── filling: {filling['tokens']} tokens", "cyan")))


@app.command(epilog="Example: bd3-scale data verify data/quickstart")
def verify(data: Data, as_json: AsJson = False) -> None:
    """Check prepared data against their manifest and indices: sizes, hashes, tokens, document bounds, counts.

    Exit code 1 if something is wrong.
    """
    from bd3_scale.data.stored import stored_data
    from bd3_scale.data.verify import problems

    problems_by_place: dict[str, list[str]] = {}
    for one in stored_data(data):
        with Bar(one.place) as bar:
            problems_by_place[one.place] = list(problems(one, bar.show))
    if as_json:
        put(json.dumps(problems_by_place))
    else:
        for place, lines in problems_by_place.items():
            for line in lines:
                Console(soft_wrap=True).print(styled((line, "red")))
            if not lines:
                say(f"{place}: sound")
    if any(problems_by_place.values()):
        raise typer.Exit(1)
