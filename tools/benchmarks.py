"""Renew the tables of benchmarks/ that this machine can measure, each with the tool that measures it: `make
benchmarks`.

    python tools/benchmarks.py --list
    python tools/benchmarks.py --only generate --only checkpoint
    python tools/benchmarks.py --all            also those that need hours, a GPU or data that are not here

A table stands in its file between `<!-- begin: NAME -->` and `<!-- end: NAME -->`. The output of its tool replaces it
after the tool has succeeded; if the tool fails, is killed, or exceeds its time limit, the file does not change. Other
output of tools is in build/benchmarks/NAME.log. Exit status 1: a table was not renewed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NoReturn

sys.path.insert(0, str(Path(__file__).parents[1]))  # from a checkout that is not installed

from bd3_scale.observe.environment import cpu_in_words, software, source_commit
from bd3_scale.resilience.files import write_atomically

ROOT = Path(__file__).parents[1]
FOLDER, LOGS = ROOT / "benchmarks", ROOT / "build/benchmarks"
GRACE_SECONDS = 5.0
GPU = "a GPU"


@dataclasses.dataclass(frozen=True)
class Part:
    """A table: its file in benchmarks/, and the command that prints it.

    Attributes:
        command: as typed in the repository's root.
        minutes: time limit, after which the command and all processes that it started are killed.
        needs: what not every machine has, or has time for; if empty, the command runs everywhere.
        bare: the command prints only a table; hardware, versions, commit and command are added above it.
    """

    file: str
    command: str
    minutes: float
    needs: str = ""
    bare: bool = False


PARTS = {
    "step": Part(
        "step.md",
        "python tools/bench_step.py --rival --objective all --shapes 256/16/8,1024/16/2 --precisions fp32,bf16",
        20,
    ),
    "data": Part("data.md", "python tools/bench_data.py", 20),
    "data-order": Part("data.md", "python tools/bench_order.py", 10),
    "attention-cpu": Part("attention.md", "python tools/bench_attention.py --device cpu", 20),
    "attention-cuda": Part("attention.md", "python tools/bench_attention.py --device cuda", 10, GPU),
    "generate": Part("generate.md", "OMP_NUM_THREADS=1 python tools/bench_generate.py", 10, bare=True),
    "generate-rules": Part(
        "generate.md",
        "OMP_NUM_THREADS=1 python tools/bench_generate.py --checkpoint runs/tinyshakespeare --tokens 256 --batch 16",
        10,
        "the run of recipes/tinyshakespeare.yaml, here with diffusion.block_size=16 train.steps=3000",
        bare=True,
    ),
    "gguf": Part("gguf.md", "OMP_NUM_THREADS=1 python tools/bench_gguf.py", 20, bare=True),
    "serve": Part("serve.md", "OMP_NUM_THREADS=1 python tools/bench_serve.py", 12, bare=True),
    "serve-trained": Part(
        "serve.md",
        "OMP_NUM_THREADS=1 python tools/bench_serve.py --checkpoint runs/quickstart --unmasking dynamic",
        8,
        "a run of the quickstart",
        bare=True,
    ),
    "gguf-quality": Part(
        "gguf.md",
        "OMP_NUM_THREADS=1 python tools/bench_gguf.py --quality --checkpoint runs/any "
        "--types q8_0,q6_k,q4_k_m,q4_0,q3_k_m,q2_k",
        60,
        "a trained run; gguf.md says which",
        bare=True,
    ),
    "checkpoint": Part("faults.md", "OMP_NUM_THREADS=1 python tools/bench_checkpoint.py", 15),
    "faults": Part("faults.md", "python tools/fault_campaign.py --kills 100 --seed 2", 120, "an hour"),
    "parity": Part("parity.md", "python -W ignore -m tests.integration.parity", 20, bare=True),
    "plan": Part("plan.md", "python tools/bench_plan.py", 20),
    "traffic": Part("traffic.md", "python tools/bench_traffic.py", 20),
    "adaptation": Part(
        "conversion.md",
        "python tools/compare_adaptation.py books-train.jsonl.zst --validation books-valid.jsonl.zst "
        "--out runs/adaptation",
        120,
        "books, and an hour",
        bare=True,
    ),
    "variance": Part(
        "variance.md",
        "python tools/variance.py runs/any --draws 48 --out variance.png",
        60,
        "a run on books; variance.md says which",
        bare=True,
    ),
}


class NotRenewedError(Exception):
    """The reason why a table was not renewed."""


def begin(name: str) -> str:
    return f"<!-- begin: {name} -->"


def end(name: str) -> str:
    return f"<!-- end: {name} -->"


def with_table(text: str, name: str, table: str) -> str:
    """Return `text` with `table` between its marks. ValueError: the marks are missing or not unique."""
    if text.count(begin(name)) != 1 or text.count(end(name)) != 1 or text.index(begin(name)) > text.index(end(name)):
        raise ValueError(f"the table's place is from {begin(name)} to {end(name)}, each once")
    before, _, rest = text.partition(begin(name))
    after = rest.partition(end(name))[2]
    return f"{before}{begin(name)}\n\n{table}\n\n{end(name)}{after}"


def renew(name: str, part: Part, commit: str) -> None:
    """Run the tool of a part and write its table into the file. NotRenewedError: the file was not changed."""
    path = FOLDER / part.file
    try:
        # The marks are checked before the tool runs for minutes. The file is read again afterwards, since somebody may
        # have edited it meanwhile.
        with_table(path.read_text(), name, "")
        table = measure(name, part)
        if part.bare:
            table = f"{conditions(part.command, commit)}\n\n{table}"
        write_atomically(path, with_table(path.read_text(), name, table))
    except (OSError, ValueError) as error:
        raise NotRenewedError(f"benchmarks/{part.file}: {error}") from None


def measure(name: str, part: Part) -> str:
    """Return the output of a part's tool. NotRenewedError: it fails, takes too long or prints no table."""
    LOGS.mkdir(parents=True, exist_ok=True)
    out, log = LOGS / f"{name}.md", LOGS / f"{name}.log"
    try:
        with out.open("wb") as to, log.open("wb") as errors, started(part.command, to, errors) as process:
            code = process.wait(60 * part.minutes)
    except subprocess.TimeoutExpired:
        raise NotRenewedError(f"killed at its limit of {part.minutes:g} minutes") from None
    if code:
        said = log.read_bytes().decode(errors="replace").strip().splitlines()
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        raise NotRenewedError(f"{how}{': ' if said else ''}{said[-1] if said else ''}; see {log.relative_to(ROOT)}")
    table = out.read_text(encoding="utf-8").strip()
    if "\n|--" not in table and "\n| --" not in table:
        raise NotRenewedError(f"it printed no table; see {out.relative_to(ROOT)}")
    return table


@contextlib.contextmanager
def started(command: str, out: BinaryIO, errors: BinaryIO) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in a new session; at the end all processes of the session are killed."""
    words, environment = shlex.split(command), dict(os.environ)
    while "=" in words[0]:
        variable, _, value = words.pop(0).partition("=")
        environment[variable] = value
    words = [sys.executable if word == "python" else word for word in words]
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, cwd=ROOT, env=environment, start_new_session=True
    )
    try:
        yield process
    finally:
        try:
            if process.poll() is None:
                # SIGINT first: on it Python removes temporary folders.
                os.killpg(process.pid, signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):  # nothing of it is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def conditions(command: str, commit: str) -> str:
    """Return the conditions of a table: hardware, versions, commit and command."""
    versions = {"python": sys.version.split()[0], **software()}
    names = ("python", "torch", "megatron-core", "deepspeed")
    return "\n".join(
        [
            f"- hardware: {cpu_in_words()}",
            f"- versions: {', '.join(f'{name} {versions[name]}' for name in names)}",
            f"- commit: {commit}",
            f"- command: {command}",
        ]
    )


def chosen(options: argparse.Namespace) -> Mapping[str, Part]:
    """Return the parts to run; parts that are named run whatever they need."""
    if options.only:
        return {name: PARTS[name] for name in PARTS if name in options.only}
    return {name: part for name, part in PARTS.items() if options.all or not part.needs}


def stop(number: int, frame: object) -> NoReturn:
    # An exception, so that the running tool is ended, too.
    raise SystemExit(128 + number)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    parser.add_argument("--only", action="append", choices=PARTS, metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("--all", action="store_true", help="also what needs more than this machine and minutes")
    options = parser.parse_args(arguments)
    parts = PARTS if options.list else chosen(options)
    if options.list:
        for name, part in parts.items():
            needs = f", needs {part.needs}" if part.needs else ""
            print(f"{name}: benchmarks/{part.file}, at most {part.minutes:g} minutes{needs}\n    {part.command}")
        return 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    commit = source_commit()
    failed = 0
    for name, part in parts.items():
        print(f"{name}: {part.command}", flush=True)
        began = time.monotonic()
        try:
            renew(name, part, commit)
            said = f"benchmarks/{part.file} renewed"
        except NotRenewedError as error:
            failed += 1
            said = f"NOT renewed: {error}"
        print(f"{name}: {said} ({time.monotonic() - began:.0f} s)", flush=True)
    for name, part in PARTS.items():
        if name not in parts and not options.only:
            print(f"{name}: left out, needs {part.needs}: {part.command}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
