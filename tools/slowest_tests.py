"""Show where the time of the tests goes, from the reports of `make test`: `python tools/slowest_tests.py`.

Prints the time by tier, by folder and by test, in seconds of one worker, including set-up and tear-down. `--markdown
FILE` replaces the part of a file between the comments "slowest tests" and "end of slowest tests".
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).parents[1]))  # from a checkout that is not installed

from bd3_scale.observe.environment import cpu_in_words, read_environment
from bd3_scale.resilience.files import write_atomically

REPORTS = Path("build/tests")
BEGIN, END = "<!-- slowest tests -->", "<!-- end of slowest tests -->"


@dataclass(frozen=True)
class Report:
    """One run of pytest: its name, the seconds that it took, and those of each test."""

    name: str
    seconds: float
    tests: dict[str, float]


def read_report(path: Path) -> Report:
    """Read a JUnit report. ValueError: `path` is not one."""
    try:
        suite = ElementTree.parse(path).getroot().find("testsuite")
    except ElementTree.ParseError as error:
        raise ValueError(f"{path} is no report of pytest: {error}; run `make test` again") from None
    if suite is None:
        raise ValueError(f"{path} is no report of pytest: it has no testsuite; run `make test` again")
    tests: Counter[str] = Counter()
    for case in suite.iter("testcase"):
        if case.find("skipped") is None:
            file = str(case.get("classname")).replace(".", "/") + ".py"
            tests[f"{file}::{case.get('name')}"] += float(case.get("time", 0))
    return Report(path.stem, float(suite.get("time", 0)), dict(tests))


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]


def as_markdown(reports: Sequence[Report], most: int) -> str:
    """Return tables of the tiers, the folders, and the `most` slowest tests."""
    tests: Counter[str] = Counter()
    folders: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for report in reports:
        for name, seconds in report.tests.items():
            _, *folder_of, _ = name.partition("::")[0].split("/")
            folder = "/".join(folder_of) or "."
            tests[name.removeprefix("tests/")] += seconds
            folders[folder] += seconds
            counts[folder] += 1
    here = read_environment()
    runs = [(report.name, len(report.tests), f"{report.seconds:.0f}") for report in reports]
    return "\n".join(
        [
            f"On {cpu_in_words()}, torch {here.versions['torch']}:",
            "",
            *table(["run of pytest", "tests", "wall seconds"], runs),
            "",
            *table(["folder", "tests", "seconds"], [(f, counts[f], f"{s:.0f}") for f, s in folders.most_common()]),
            "",
            *table(["test", "seconds"], [(f"`{name}`", f"{s:.1f}") for name, s in tests.most_common(most)]),
        ]
    )


def main(
    reports: Annotated[Path, typer.Argument(help="Folder of the reports.")] = REPORTS,
    most: Annotated[int, typer.Option("--most", min=1, help="Tests that are named.")] = 100,
    markdown: Annotated[Path | None, typer.Option(help="Replace the tables in this file.")] = None,
) -> None:
    """Print where the time of the last test run went."""
    paths = sorted(reports.glob("*.xml"))
    if not paths:
        raise typer.BadParameter(f"{reports} holds no report: `make test` leaves them in {REPORTS}")
    text = as_markdown([read_report(path) for path in paths], most)
    if markdown is None:
        typer.echo(text)
        return
    before, begin, rest = markdown.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise typer.BadParameter(f"{markdown} has no place for the tables, between {BEGIN} and {END}")
    write_atomically(markdown, f"{before}{begin}\n\n{text}\n\n{end}{after}")


if __name__ == "__main__":
    typer.run(main)
