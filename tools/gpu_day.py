"""Run everything that needs a GPU, in the order of its value and within a given time: `python tools/gpu_day.py`.

    python tools/gpu_day.py --minutes 10                      on a machine with a GPU, PyTorch and Triton
    python tools/gpu_day.py --list-wheels                     how to download further packages, on a machine with a
    network python tools/gpu_day.py --wheels wheels --minutes 10      installs them first, on a machine without one
    python tools/gpu_day.py --only kernels --only training
    python tools/gpu_day.py --dry                             the same parts on tiny shapes, without a GPU

Each part is a process with a share of the remaining time; when that is over, it is killed with all processes that it
started. It leaves a result at once: NAME.json with its rows, its status and its output, and NAME.log while it runs. At
the end come a table, the failures, and gpu_day.md with the tables for benchmarks/. Exit status 1: something failed; 128
+
n: signal n ended it, and the results so far are written.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # from a checkout that is not installed

from bd3_scale.observe.environment import source_commit
from tools.gpu_day_parts import PARTS
from tools.gpu_day_wheels import install, list_wheels

ROOT = Path(__file__).parents[1]
# Seconds between SIGTERM, on which a part prints its stack, and SIGKILL.
GRACE_SECONDS = 2.0
# Characters of a part's output in its result; its log has everything.
MOST_OUTPUT = 20_000
OK, FAILED, TIMED_OUT, INTERRUPTED, ABSENT, NOT_RUN = "ok", "failed", "timed out", "interrupted", "not here", "not run"


class StoppedError(Exception):
    """Says that a signal ended the run."""

    def __init__(self, number: int) -> None:
        super().__init__(f"by {signal.Signals(number).name}")
        self.number = number


@dataclasses.dataclass
class Result:
    """The result of a part. `why`: one line, if the status is not `ok`; `output`: the end of its output."""

    part: str
    status: str = NOT_RUN
    why: str = ""
    seconds: float = 0.0
    limit_seconds: float = 0.0
    commit: str = ""
    command: str = ""
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    output: str = ""

    @property
    def failed(self) -> bool:
        return self.status not in (OK, ABSENT)


def main() -> int:
    began = time.monotonic()
    options = parse(sys.argv[1:])
    if options.list_wheels:
        print(list_wheels())
        return 0
    out = options.out or ROOT / "runs" / time.strftime("gpu-day-%Y%m%d-%H%M%S")
    out.mkdir(parents=True, exist_ok=True)
    results = {name: Result(name) for name in PARTS if name in (options.only or PARTS)}
    deadline = began + 60 * options.minutes
    code = 0
    try:
        with stop_signals():
            site = options.wheels and install(options.wheels, out.resolve() / "site", deadline)
            sys.path += [str(site)] if site else []
            environment = environment_of(site)
            for name, limit in limits(list(results), deadline):
                results[name].limit_seconds = limit
                run_part(results[name], out, environment, dry=options.dry)
                print(f"{name}: {results[name].status} {results[name].why}".rstrip(), flush=True)
    except StoppedError as stopped:
        print(f"ended {stopped}", file=sys.stderr)
        code = 128 + stopped.number
    write(out / "gpu_day.md", markdown(results, options.dry))
    show(results)
    print(f"results: {out}")
    return code or int(any(result.failed for result in results.values()))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything; default: 10")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for the results; default: a new one in runs/")
    parser.add_argument("--only", action="append", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR", help="install these for the parts, in the results' folder"
    )
    parser.add_argument("--list-wheels", action="store_true", help="print how to fetch them")
    parser.add_argument("--dry", action="store_true", help="on tiny shapes, without a GPU")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes is {options.minutes:g}: give more than 0")
    return options


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """Let the first of these signals raise `StoppedError`; later ones are ignored."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def stop(number: int, frame: FrameType | None) -> None:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        raise StoppedError(number)

    for number in numbers:
        signal.signal(number, stop)
    yield
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def environment_of(site: Path | None) -> dict[str, str]:
    """Return the environment of the parts: this checkout comes before the wheels, and these before the machine's."""
    path = [str(ROOT), *([str(site)] if site else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}
    # This variable would replace every backend that is compared.
    environment.pop("BD3_SCALE_ATTENTION", None)
    return environment


def limits(names: Sequence[str], deadline: float) -> Iterator[tuple[str, float]]:
    """Yield each part with its time limit: its share of the remaining time, less the time to end it."""
    for index, name in enumerate(names):
        shares = [PARTS[each].share for each in names[index:]]
        left = deadline - time.monotonic() - GRACE_SECONDS
        yield name, max(0.0, left * shares[0] / sum(shares))


def run_part(result: Result, out: Path, environment: Mapping[str, str], *, dry: bool) -> None:
    """Run a part and write its result, however it ends."""
    log, rows, kept = (out / f"{result.part}.{ending}" for ending in ("log", "rows.jsonl", "json"))
    for path in (rows, kept):
        path.unlink(missing_ok=True)
    words = [sys.executable, "tools/gpu_day_parts.py", result.part, str(out.resolve()), *["--dry"] * dry]
    result.commit, result.command = source_commit(), shlex.join(["python", "tools/gpu_day.py", *sys.argv[1:]])
    began = time.monotonic()
    try:
        with log.open("wb") as file, ended_with_all(words, file.fileno(), environment) as process:
            code = process.wait(result.limit_seconds)
            result.status = OK if code == 0 else FAILED
            result.why = f"exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        result.status, result.why = TIMED_OUT, f"killed at its limit of {result.limit_seconds:.0f} s"
    except StoppedError as stopped:
        result.status, result.why = INTERRUPTED, str(stopped)
        raise
    finally:
        result.seconds = time.monotonic() - began
        read(result, log, rows)
        write(kept, json.dumps(dataclasses.asdict(result), indent=1))


@contextlib.contextmanager
def ended_with_all(words: Sequence[str], log: int, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program in a new process group; at the end all processes of the group are killed."""
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, env=environment, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
        with contextlib.suppress(ProcessLookupError):  # nothing of it is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read(result: Result, log: Path, rows: Path) -> None:
    """Read a part's rows and output into its result."""
    said = log.read_bytes().decode(errors="replace") if log.exists() else ""
    result.output = said[-MOST_OUTPUT:]
    # A part that was killed may have left a line half written.
    whole = rows.read_text().split("\n")[:-1] if rows.exists() else []
    found = [json.loads(line) for line in whole]
    result.rows = [line["row"] for line in found if "row" in line]
    if absent := [line["absent"] for line in found if "absent" in line]:
        result.status, result.why = ABSENT, absent[0]
    wrong = [row for row in result.rows if not row.get("ok", True)]
    if result.status == FAILED and wrong:
        result.why = f"{len(wrong)} of {len(result.rows)} rows, the first: {wrong[0]['why']}"
    elif result.status == FAILED and said.strip():
        result.why = said.strip().splitlines()[-1]


def write(path: Path, text: str) -> None:
    """Write a file completely or not at all; with the standard library alone, since wheels may not be installed yet."""
    aside = path.with_name(f".{path.name}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def markdown(results: Mapping[str, Result], dry: bool) -> str:
    """Return all tables with their conditions: hardware, versions, commit and command."""
    known = {row["what"]: row["is"] for row in results["environment"].rows} if "environment" in results else {}
    hardware = ", ".join(known[what] for what in ("GPU 0", "CPU") if what in known) or "not known"
    names = ("python", "torch", "triton", "megatron-core", "deepspeed", "CUDA of torch")
    versions = ", ".join(f"{name} {known[name]}" for name in names if name in known) or "not known"
    driver = next((value for what, value in known.items() if "driver" in what), "none")
    first = next(iter(results.values()))
    lines = ["# A GPU's day" + " (dry: tiny shapes without a GPU, whose times say nothing)" * dry, ""]
    lines += [f"- hardware: {hardware}; driver {driver}", f"- versions: {versions}"]
    lines += [f"- commit: {first.commit or 'unknown'}", f"- command: `{first.command}`", ""]
    for name, result in results.items():
        ended = f"{result.status}{': ' * bool(result.why)}{result.why}"
        lines += [f"## {PARTS[name].title}", "", f"{ended} ({result.seconds:.0f} s).", ""]
        lines += [*table(result.rows), ""] if result.rows else []
    return "\n".join(lines)


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    columns = list(dict.fromkeys(column for row in rows for column in row if column != "ok"))
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield "| " + " | ".join(cell(row.get(column, "")).replace("|", "/") for column in columns) + " |"


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return " ".join(str(value).split())


def show(results: Mapping[str, Result]) -> None:
    """Print the parts as a table, with rich if it is installed, and the failures."""
    rows = [(r.part, r.status, f"{r.seconds:.0f} of {r.limit_seconds:.0f}", str(len(r.rows))) for r in results.values()]
    columns = ("part", "", "seconds", "rows")
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for texts in (columns, *rows):
            print("  ".join(text.ljust(12) for text in texts).rstrip())
    else:
        shown = Table(*columns)
        for texts in rows:
            shown.add_row(*texts)
        Console().print(shown)
    for result in results.values():
        if result.failed:
            print(f"failed: {result.part}: {result.status} {result.why}".rstrip())


if __name__ == "__main__":
    sys.exit(main())
