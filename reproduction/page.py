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
            parts.append(
                f"Not measured yet: {', '.join(wanting) or 'efficiency'} (`python -m reproduction` continues)."
            )
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
    bytes_of_text = ", and a token is a byte" if unit == "byte" else ""
    tokens = scale.steps * scale.recipe.train.global_batch_size * scale.length
    model = scale.recipe.model
    warning = (
        "**This is the quick form. It only shows that the script works. Its numbers mean nothing.**\n\n"
        if scale.name == "quick"
        else ""
    )
    return (
        "# The paper's tables in small\n\n"
        f"{warning}"
        "`python -m reproduction` writes this page from the records of its runs. Nothing here is written by hand.\n\n"
        f"**Training.** Every row is the same model ({model.num_layers} layers, hidden size {model.hidden_size}, "
        f"[recipe]({_recipe_link(scale)})), trained on the same text: {tokens:,} tokens in {scale.steps} steps, with "
        f"{len(scale.seeds)} seed{'s' if len(scale.seeds) > 1 else ''}. If a row differs from this, its section says "
        f"so. Sequences have {scale.length} tokens{bytes_of_text}. L' is the block size, L is "
        "the length of a sequence.\n\n"
        f"**Evaluation.** The held-out text is {scale.sequences:,} sequences of documents on which no row was trained. "
        "Every row is given the first token of a sequence, because AR does not predict it. NELBOs are over mask rates "
        f"in [0, 1], with {scale.draws} draws of noise. At L'=1 they are exact.\n\n"
        f"**Intervals.** A figure after ± is half of a 95% interval. {_seeds(findings)} Two rows are compared on the "
        "same sequences.\n\n"
        "**Verdicts.** A claim is *undecided* if the 95% interval of its difference includes 0. Otherwise it *holds* "
        "if the difference has the sign that is claimed, and *does not hold* if it has the opposite sign. Some claims "
        'have another rule, which is then given. "Costs more" means a higher NELBO.'
    )


def _seeds(findings: Findings) -> str:
    spread = findings.seeds()
    if not spread.freedom:
        return "These intervals are over text only, because one seed shows nothing about other seeds."
    scale = findings.scale
    several = [row for row in rows(scale) if len(row.seeds or scale.seeds) > 1 and findings.has(row.name)]
    apart = {row.title: float(np.ptp(findings.measured(row.name).by_seed)) for row in several}
    widest = max(apart, key=apart.__getitem__)
    others = max((value for title, value in apart.items() if title != widest), default=0.0)
    doubt = (
        f" Comparisons with {widest} are less certain than their intervals say."
        if apart[widest] > 2 * others > 0
        else ""
    )
    return (
        "These intervals are over text and seeds. The spread over seeds is pooled over rows: its standard deviation is "
        f"{spread.deviation:.4f} nats per {findings.scale.unit}, with {spread.freedom} degrees of freedom. The seeds "
        f"of {widest} differ by {apart[widest]:.4f}, those of every other row by at most {others:.4f}.{doubt}"
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
            f"Training took {hours:.1f} hours in total. Each row used one thread. Some rows ran at the same time as "
            "other work. If each row were as fast as the fastest row with the same block sizes, training would take "
            f"{alone:.1f} hours. Machine: {'; '.join(machines)}. Versions: {'; '.join(versions)}. A + after a commit "
            "means uncommitted changes.",
            table(["row", "seed", "tokens", "tokens/s", "minutes", "hash of the recipe", "commit", "date"], lines),
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
