"""Renew what commands print in README.md and docs/, each block by the commands beside its name here.

    python tools/docs_output.py --list
    python tools/docs_output.py --only data-stats --only evaluate
    python tools/docs_output.py --all            also those that want minutes or SLURM

A block stands between `<!-- begin: NAME -->` and `<!-- end: NAME -->`. Its commands run in a temporary folder with
a copy of the tiny run in tests/fixtures/format-3, a small corpus and the repository's recipes. A block stays as it was
if a command ends otherwise than expected. `tests/tools/test_docs_output.py` runs the cheap ones and compares. Exit
status 1: a block was not renewed.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # from a checkout that is not installed

from bd3_scale.resilience.files import write_atomically  # noqa: E402
from tools.benchmarks import with_table  # noqa: E402

COLUMNS = 100
FLIP_A_BYTE = (
    "python -c \"from pathlib import Path; p = Path('data/train/shard.00000.mds.zstd'); "
    'b = bytearray(p.read_bytes()); b[100] ^= 1; p.write_bytes(b)"'
)


@dataclasses.dataclass(frozen=True)
class Output:
    """A block of output: the page that has it, and what is run for it.

    Attributes:
        page: of the repository.
        commands: shown with what they print, in order; without a shell, but for `&&`.
        before: run first, and not shown.
        keep: a pattern; lines that it does not match are left out, and `…` stands for them. Default: all lines.
        status: exit status of the last command.
        cheap: it takes seconds, so that a test repeats it.
        show: whether the block begins with the command line, or what stands above the block says it.
        needs: what not every machine has, or has time for.
        after: run last, also where a command fails.
    """

    page: str
    commands: tuple[str, ...]
    before: tuple[str, ...] = ()
    keep: str = ""
    status: int = 0
    cheap: bool = False
    show: bool = True
    needs: str = ""
    after: tuple[str, ...] = ()


_TRAINED = (
    "bd3-scale train recipe.yaml train.steps=600 optimizer.lr=0.02 evaluation.every_steps=300 "
    "checkpoint.every_steps=300"
)
# A run of two nodes, one of which is killed once a checkpoint is there.
_SLURM = 'eval "$(cluster/dev-slurm --dir slurm env)" && '
_NODE_KILLED = (
    "rm -r data && bd3-scale data prepare corpus/ --out data/bytes --tokenizer bytes --seq-len 64",
    "cluster/dev-slurm --dir slurm up --nodes 3",
    _SLURM
    + "bd3-scale submit recipes/paper-110m-cpu.yaml --profile dev-slurm --nodes 2 run_dir=runs/first train.steps=300",
    "until ls runs/first/checkpoints/step-00000040 2>/dev/null; do sleep 1; done",
    "cluster/dev-slurm --dir slurm kill-node 2",
    _SLURM + 'until bd3-scale status runs/first --json | grep -qE \'"state": "(done|failed)"\'; do sleep 3; done',
)
OUTPUTS = {
    "quickstart": Output(
        "README.md",
        ("bd3-scale quickstart",),
        keep=r"^[3-6]\. |^\$ bd3-scale (train|evaluate)|held-out NELBO|saved runs|killed|resumed|the loss seq|"
        r"bitwise equal|^NELBO|^perplexity|ended by|tokens/s$",
        show=False,
        needs="five minutes of two cores",
    ),
    "data-refused": Output(
        "docs/data.md",
        ("bd3-scale data prepare corpus/ --out data/mine --tokenizer bytes --seq-len 512",),
        before=("rm -r data && bd3-scale data prepare corpus/ --out data/mine --tokenizer bytes --seq-len 256",),
        status=2,
        cheap=True,
    ),
    "data-stats": Output("docs/data.md", ("bd3-scale data stats data --split train",), cheap=True),
    "data-verify": Output("docs/data.md", ("bd3-scale data verify data",), before=(FLIP_A_BYTE,), status=1, cheap=True),
    "data-prepare": Output(
        "docs/cluster.md",
        ("bd3-scale data prepare corpus/ --out data/bytes --tokenizer bytes --seq-len 64",),
        before=("rm -r data",),
        keep=r"^(?!tokenising).*[^ ]",
        cheap=True,
        show=False,
    ),
    "cluster-run": Output(
        "docs/cluster.md",
        (_SLURM + "bd3-scale logs runs/first --supervisor", _SLURM + "bd3-scale status runs/first"),
        before=_NODE_KILLED,
        after=("cluster/dev-slurm --dir slurm down",),
        keep=r"attempt|[Nn]ode fail|SIGTERM|[│┃━─]",
        needs="SLURM, and five minutes",
    ),
    "checkpoint-list": Output("docs/failures.md", ("bd3-scale checkpoint list run",), cheap=True),
    "resume-changes": Output(
        "docs/train.md",
        ("bd3-scale train recipe.yaml train.steps=12 optimizer.lr=0.02",),
        keep=r"resumed after|from step",
    ),
    "evaluate": Output(
        "docs/evaluate.md",
        ("bd3-scale evaluate run --block-size 1 --block-size 8 --sequences 128 --draws 8",),
        before=(_TRAINED,),
    ),
    "export": Output("docs/convert.md", ("bd3-scale convert export run --out served/tiny",)),
    "plan": Output("docs/plan.md", ("bd3-scale plan recipes/8b.yaml --gpus 64 --vocabulary 151936 --tokens 1e12",)),
    "plan-search": Output(
        "docs/plan.md", ("bd3-scale plan recipes/8b.yaml --gpus 64 --vocabulary 151936 --search",), needs="two minutes"
    ),
}


class NotRenewedError(Exception):
    """The reason why a block stays as it was."""


def prepared(folder: Path) -> None:
    """Fill a folder with what commands of the documents are run on."""
    shutil.copytree(ROOT / "tests/fixtures/format-3", folder, dirs_exist_ok=True)
    (folder / "corpus").mkdir()
    for number in range(200):  # the same for ever, so that the same documents are held out
        verse = f"{number} green bottles hanging on the wall, and if one green bottle should fall: {number - 1}.\n"
        (folder / "corpus" / f"{number}.txt").write_text(verse * (number % 40 + 1), encoding="utf-8")
    for name in ("recipes", "cluster"):
        (folder / name).symlink_to(ROOT / name)


def run(command: str, folder: Path, status: int = 0) -> str:
    """Return what a command prints. NotRenewedError: it ends otherwise than with `status`."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "COLUMNS": str(COLUMNS),
        "TERM": "dumb",
        "NO_COLOR": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=1200,
    )
    if done.returncode != status:
        raise NotRenewedError(f"{command!r} ended with {done.returncode}, not {status}: {done.stdout[-500:]}")
    return done.stdout.replace(str(folder), "…").replace(str(ROOT), "bd3_scale")


def kept_lines(text: str, keep: str) -> list[str]:
    """Return the lines that the pattern matches, and `…` for each stretch of others; of all, if there is no pattern."""
    lines: list[str] = []
    for line in text.rstrip().splitlines():
        if re.search(keep, line):
            lines.append(line.rstrip())
        elif lines and lines[-1] != "…" and line.strip():
            lines.append("…")
    return lines if not lines or lines[-1] != "…" else [*lines[:-1], "…"]


def measured(output: Output) -> str:
    """Return the block of code, as a page has it. NotRenewedError: a command fails."""
    with tempfile.TemporaryDirectory(prefix="bd3_scale-docs-") as name:
        folder = Path(name)
        prepared(folder)
        try:
            for command in output.before:
                run(command, folder)
            lines: list[str] = []
            for command in output.commands:
                last = command is output.commands[-1]
                if output.show:
                    lines.append(f"$ {command.removeprefix(_SLURM)}")
                lines += kept_lines(run(command, folder, output.status if last else 0), output.keep)
        finally:
            for command in output.after:
                run(command, folder)
    return "\n".join(["```text", *lines, "```"])


def block_of(text: str, name: str) -> str:
    """Return what stands between the marks of a name. ValueError: it has not each of them once."""
    with_table(text, name, "")
    return text.partition(f"<!-- begin: {name} -->")[2].partition(f"<!-- end: {name} -->")[0].strip()


def normalised(block: str) -> str:
    """Return a block without what differs from run to run: numbers, hashes, widths of tables."""
    block = re.sub(r"\b[0-9a-f]{8,}\b", "0", block)
    block = re.sub(r"\d[\d,.:]*", "0", block)
    return re.sub(r"[ ─━]+", " ", block)


def renew(name: str, output: Output) -> None:
    """Run the commands of a block and put what they print into its page. NotRenewedError: the page is as it was."""
    path = ROOT / output.page
    try:
        with_table(path.read_text(encoding="utf-8"), name, "")
        block = measured(output)
        write_atomically(path, with_table(path.read_text(encoding="utf-8"), name, block))
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise NotRenewedError(f"{output.page}: {error}") from None


def chosen(options: argparse.Namespace) -> Mapping[str, Output]:
    """Return the blocks that are to be renewed; what is named is, whatever it needs."""
    if options.only:
        return {name: OUTPUTS[name] for name in OUTPUTS if name in options.only}
    return {name: output for name, output in OUTPUTS.items() if options.all or not output.needs}


def main(arguments: Sequence[str]) -> int:
    """Renew the blocks that the arguments choose; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    parser.add_argument("--only", action="append", choices=OUTPUTS, metavar="NAME", help=", ".join(OUTPUTS))
    parser.add_argument("--all", action="store_true", help="also what needs more than seconds")
    options = parser.parse_args(arguments)
    if options.list:
        for name, output in OUTPUTS.items():
            needs = f", needs {output.needs}" if output.needs else ""
            print(f"{name}: {output.page}{needs}\n    " + "\n    ".join([*output.before, *output.commands]))
        return 0
    failed = 0
    for name, output in chosen(options).items():
        began = time.monotonic()
        try:
            renew(name, output)
            said = f"{output.page} renewed"
        except NotRenewedError as error:
            failed += 1
            said = f"NOT renewed: {error}"
        print(f"{name}: {said} ({time.monotonic() - began:.0f} s)", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
