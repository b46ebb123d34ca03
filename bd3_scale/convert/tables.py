"""Print the results of conversions, as tables for people or JSON for scripts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.tree import Tree

from bd3_scale.observe.console import Console, put, styled

if TYPE_CHECKING:
    from bd3_scale.convert.gguf_report import GgufReport
    from bd3_scale.convert.inspect import Inspection
    from bd3_scale.convert.quantize import QuantizationReport

_MEASURED = (
    ("held-out NELBO, nats a token", "nelbo"),
    ("standard error over noise draws", "noise_standard_error"),
    ("standard error over text", "text_standard_error"),
)
_SHOWN_NAMES = 8


def show_gguf(report: GgufReport, path: Path) -> None:
    """Print size and accuracy of a GGUF file."""
    table = Table("", "fp32", report.type, "change", title=f"wrote and verified {path}: {report.architecture}")
    share = report.bytes_after / report.bytes_before
    table.add_row(
        "size", f"{report.bytes_before / 1e6:,.2f} MB", f"{report.bytes_after / 1e6:,.2f} MB", f"{share:.3f} of it"
    )
    measured = (report.before, report.after, report.change)
    for name, key in _MEASURED if report.before else ():
        values = (getattr(result, key) for result in measured)
        table.add_row(name, *("-" if value is None else f"{value:.4f}" for value in values))
    rates = Table("mask rate", "masked tokens", "KL, nats", "same most likely token")
    for at in report.rates:
        rates.add_row(f"{at.mask_rate:g}", f"{at.tokens:,}", f"{at.divergence:.2e}", f"{at.same_token:.4f}")
    console = Console()
    console.print(table, *([rates] if report.rates else []), sep="\n")
    if report.unchecked is not None:
        console.print(f"not compared with the model in fp32: {report.unchecked}")
    if report.seldom:
        console.print(f"rounded without the importance matrix: {_few_rows_note(report.seldom)}")
    console.print(f"run it: bd3-scale generate {path}; programs for autoregressive models generate rubbish with it")


def show_quantization(report: QuantizationReport, out: Path, engine_table: dict[str, object]) -> None:
    """Print size and accuracy of quantised weights, and which engines run them."""
    title = f"wrote and verified {out}: int{report.bits}, groups of {report.group_size}, {report.method}"
    table = Table("", "before", "after", title=title)
    table.add_row("size", f"{report.bytes_before / 1e6:,.2f} MB", f"{report.bytes_after / 1e6:,.2f} MB")
    for name, key in _MEASURED:
        row = (getattr(measured, key) for measured in (report.before, report.after))
        table.add_row(name, *("-" if value is None else f"{value:.4f}" for value in row))
    errors = Table("weight", "relative output error", title="per layer, worst first")
    for name, error in sorted(_worst(report.errors).items(), key=lambda item: -item[1]):
        errors.add_row(name, f"{error:.2e}")
    runs = Table("engine", "", title="engines")
    for name, reason in engine_table.items():
        runs.add_row(name, str(reason))
    Console().print(errors, table, runs, *(f"Marlin: {note}" for note in report.notes), sep="\n")
    if report.seldom:
        Console().print(f"rounded to nearest, without GPTQ: {_few_rows_note(report.seldom)}")
    if report.padding is not None:
        Console().print(report.padding)


def _worst(errors: Mapping[str, float]) -> dict[str, float]:
    """Return the error of each weight; for the experts of a layer only the largest."""
    worst: dict[str, float] = {}
    for name, error in errors.items():
        group = re.sub(r"\.experts\.\d+\.", ".experts.*.", name)
        worst[group] = max(error, worst.get(group, 0.0))
    return worst


def _few_rows_note(seldom: Mapping[str, int]) -> str:
    """Return a sentence with the weights that saw too few calibration rows, and the number of rows."""
    names = list(seldom)
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    least, most = f"{min(seldom.values()):,}", f"{max(seldom.values()):,}"
    rows = least if least == most else f"{least} to {most}"
    return (
        f"{', '.join(names[:_SHOWN_NAMES])}{more} saw {rows} calibration rows; more --calibration-sequences give more"
    )


def show_inspection(inspection: Inspection) -> None:
    """Print the description of a checkpoint."""
    console = Console(highlight=False)
    tree = Tree(styled((inspection.path, "bold"), f", {inspection.kind}"))
    branches: dict[str, Tree] = {}
    for tensor in inspection.tensors:
        *parents, leaf = tensor.name.split(".")
        branch = tree
        for depth in range(1, len(parents) + 1):
            key = ".".join(parents[:depth])
            branch = branches.get(key) or branches.setdefault(key, branch.add(parents[depth - 1]))
        branch.add(styled(leaf, (f"  {tensor.dtype} {list(tensor.shape)}", "dim")))
    table = Table("", "", show_header=False)
    table.add_row("parameters", f"{inspection.parameters:,}")
    table.add_row("size", f"{inspection.bytes / 1e9:.3f} GB")
    table.add_row("health", inspection.health)
    for key, value in inspection.details.items():
        table.add_row(key, str(value))
    for name, obstacle in inspection.exports.items():
        table.add_row(f"export to {name}", "yes" if obstacle is None else f"no: {obstacle}")
    console.print(tree, table)


def show_result(title: str, entries: dict[str, object], as_json: bool) -> None:
    """Print the result of a conversion, as a table or one JSON object."""
    if as_json:
        import json

        put(json.dumps({"result": title} | entries))
        return
    table = Table("", "", title=title, show_header=False)
    for key, value in entries.items():
        table.add_row(key, f"{value:,}" if isinstance(value, int) else str(value))
    Console().print(table)
