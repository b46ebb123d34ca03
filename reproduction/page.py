"""Write docs/reproduction.md from run records alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from reproduction import likelihood, masking, plots, sections
from reproduction.findings import HELD_OUT, MAIN, Findings, table
from reproduction.records import read_records
from reproduction.rows import BLOCKS, INTERVALS, Scale, rows

Section = tuple[str, tuple[str, ...], Callable[[Findings], str], Callable[[Findings, Path], None] | None, str]


def write_page(scale: Scale, folder: Path) -> Path:
    """Write the page next to `folder`, and its pictures into it; a section with missing records names them.

    ValueError: there are no records.
    """
    known = {(row.name, seed) for row in rows(scale) for seed in row.seeds or scale.seeds} | {("efficiency", 0)}
    records = {key: record for key, record in read_records(folder / "records").items() if key in known}
    if not records:
        raise ValueError(f"{folder / 'records'} has no record of the scale {scale.name}: train first, without --page")
    findings = Findings(scale, records, _texts(records))
    parts = [_head(findings)]
    for number, (title, needed, text, picture, name) in enumerate(_sections(findings), 1):
        wanting = [row for row in needed if not findings.has(row)]
        parts.append(f"## {number}. {title}")
        if wanting or (number == 8 and ("efficiency", 0) not in records):
            parts.append(f"Not measured yet: {', '.join(wanting) or 'efficiency'} (`python -m reproduction` goes on).")
            continue
        parts.append(text(findings))
        if picture is not None:
            picture(findings, folder / name)
            parts.append(f"![{title}]({folder.name}/{name})")
    parts += ["## Runs", _runs(findings)]
    page = folder.with_suffix(".md")
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def _texts(records: dict[tuple[str, int], dict[str, Any]]) -> tuple[str, ...]:
    """Return the texts, besides held-out text, that all records of the main rows have."""
    each = [{key.rpartition(", L'=")[0] for key in r["texts"]} for (row, _), r in records.items() if row in MAIN]
    return tuple(sorted(set.intersection(*each) - {HELD_OUT})) if each else ()


def _sections(findings: Findings) -> list[Section]:
    clipped = [masking.clipped_name(size, i) for size in masking.clipped_sizes(findings) for i in INTERVALS]
    searched = (*(f"l{size}" for size in BLOCKS), "mdlm")
    return [
        ("Perplexity", MAIN, likelihood.perplexity, plots.perplexity, "perplexity.png"),
        ("Block size 1", ("ar", "l1-uniform", "l1-masked"), likelihood.block_size_one, None, ""),
        ("Clipped mask rates", tuple(clipped), masking.clipped, plots.intervals, "intervals.png"),
        (
            "The searched interval",
            (*masking.searched_rows(findings).values(), *clipped),
            masking.searched,
            plots.searched,
            "searched.png",
        ),
        (
            "From an L'=L base, or from scratch",
            ("l4", "l16", "l4-finetuned", "l16-finetuned"),
            likelihood.finetuned,
            None,
            "",
        ),
        ("Other text", MAIN, likelihood.zero_shot, None, ""),
        ("Samples", ("judge", *MAIN), sections.samples, plots.samples, "samples.png"),
        ("Training efficiency", (), lambda f: sections.efficiency(f, f.records["efficiency", 0]), None, ""),
        ("One model for many block sizes", ("l1-masked", *searched[:-1], "any"), likelihood.one_for_many, None, ""),
    ]


def _head(findings: Findings) -> str:
    scale, unit = findings.scale, findings.scale.unit
    bytes_of_text = ", which are bytes" if unit == "byte" else ""
    tokens = scale.steps * scale.recipe.train.global_batch_size * scale.length
    model = scale.recipe.model
    warning = (
        "**Quick form: it proves that the script works. Its numbers mean nothing.**\n\n"
        if scale.name == "quick"
        else ""
    )
    return (
        "# The paper's tables in small\n\n"
        f"{warning}"
        "Written by `python -m reproduction` from the records of its runs; nothing here is written by hand. Every "
        f"row is the same model ({model.num_layers} layers of {model.hidden_size}, [recipe]({_recipe_link(scale)})) on "
        f"the same text, {tokens:,} tokens in {scale.steps} steps, {len(scale.seeds)} seeds, unless it says otherwise. "
        f"Sequences have {scale.length} tokens{bytes_of_text}. Held-out text is {scale.sequences:,} sequences of "
        "documents that no row trained on, of which every row is given the first token, since AR predicts none; NELBOs "
        f"are over mask rates of [0, 1], {scale.draws} draws, and exact at L'=1.\n\n"
        f"Intervals of 95% are {_seeds(findings)}; differences are between the same sequences. A claim *holds* or "
        "*does not hold* where its difference is outside its interval, and is *undecided* otherwise, unless another "
        "rule is given."
    )


def _seeds(findings: Findings) -> str:
    spread = findings.seeds()
    if not spread.freedom:
        return "over text alone, since one seed tells nothing of other trainings"
    scale = findings.scale
    several = [row for row in rows(scale) if len(row.seeds or scale.seeds) > 1 and findings.has(row.name)]
    apart = {row.title: float(np.ptp(findings.measured(row.name).by_seed)) for row in several}
    widest = max(apart, key=apart.__getitem__)
    others = max((value for title, value in apart.items() if title != widest), default=0.0)
    doubt = "; what compares with it is less sure than its interval says" if apart[widest] > 2 * others > 0 else ""
    return (
        f"over text and seeds, whose spread ({spread.deviation:.4f} nats a {findings.scale.unit}, {spread.freedom} "
        f"degrees of freedom) is pooled over rows (the seeds of {widest} are {apart[widest]:.4f} apart, those of the "
        f"others at most {others:.4f}{doubt})"
    )


def _recipe_link(scale: Scale) -> str:
    return f"../recipes/paper-small/{scale.name}.yaml"


def _runs(findings: Findings) -> str:
    lines = []
    for row in rows(findings.scale):
        for record in findings.of(row.name):
            made = record["made"]
            commit = made["commit"] + ("+" if made["uncommitted"] else "")
            training = record["training"]
            lines.append(
                [
                    row.name,
                    record["seed"],
                    f"{training['tokens']:,}",
                    f"{training['tokens'] / training['seconds']:,.0f}",
                    f"{training['seconds'] / 60:.1f}",
                    record["asked"]["recipe"],
                    commit,
                    made["date"],
                ]
            )
    done = [record for record in findings.records.values() if "training" in record]
    machines = sorted({", ".join(record["made"]["hardware"]) for record in done})
    versions = sorted({", ".join(f"{k} {v}" for k, v in record["made"]["versions"].items()) for record in done})
    hours = sum(record["training"]["seconds"] for record in done) / 3600
    alone = sum(record["training"]["tokens"] / _speed(findings, record["row"]) for record in done) / 3600
    return "\n\n".join(
        [
            f"Training took {hours:.1f} hours on the clock, one thread each, some beside other work; at the speed of "
            f"the quickest row with the same block sizes it is {alone:.1f} hours. "
            f"Machine: {'; '.join(machines)}. Versions: {'; '.join(versions)}. A commit with + had "
            "uncommitted changes.",
            table(["row", "seed", "tokens", "tokens/s", "minutes", "recipe", "commit", "date"], lines),
        ]
    )


def _speed(findings: Findings, name: str) -> float:
    """Return the tokens per second of the fastest row with the same objective and block sizes."""

    def kind(name: str) -> tuple[object, ...]:
        row = findings.row(name)
        return *map(row.overrides.get, ("diffusion.objective", "diffusion.block_size_schedule")), row.block_sizes

    trained = ((other, r["training"]) for (other, _), r in findings.records.items() if "training" in r)
    alike = (training for other, training in trained if kind(other) == kind(name))
    return max(training["tokens"] / training["seconds"] for training in alike)
