"""Measure the data pipeline against others: preparing, reading, starts, memory, downloads and packing.

    python tools/bench_data.py                          the tables of benchmarks/data.md
    python tools/bench_data.py --only loader --rounds 5
    python tools/bench_data.py --text FOLDER            with that text, as `bd3-scale data prepare` reads it

Packages that are not installed are left out, and the table says so. Two of them require other versions of packages than
bd3_scale does, but run with these, too; install them into an environment with bd3_scale:

    pip install --no-deps litdata lightning-utilities datatrove orjson humanize

Everything runs in separate processes. Their CPU seconds count, with those of all processes that they start, without
imports. Compared packages take turns, and figures are medians over the turns.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # from a checkout that is not installed

from bd3_scale.observe.environment import cpu_in_words, source_commit
from tools import bench_data_loader, bench_data_node, bench_data_prepare
from tools.bench_data_child import NotMeasuredError, measured, missing

RANKS = 2
# Up to so many shards all files are created (some file systems allow no more links of one file).
ALL_THERE = 20_000
# Memory in MiB at which a start is killed.
MOST_MIB = 14_000
PACKAGES = (
    "bd3_scale",
    "torch",
    "tokenizers",
    "mosaicml-streaming",
    "megatron-core",
    "datasets",
    "datatrove",
    "litdata",
    "numpy",
)
Row = Sequence[str]
Contenders = Mapping[str, tuple[Callable[..., dict[str, Any]], tuple[str, ...]]]


class Bench:
    """Shared by the parts: a folder, the text in it and files made from it."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.options = folder, options
        self.megabytes = self.once(
            bench_data_prepare.corpus,
            text=str(options.text.absolute()) if options.text else "",
            out=str(folder),
            megabytes=options.megabytes,
            vocab_size=options.vocab_size,
        )["megabytes"]

    def path(self, name: str) -> str:
        """Return the path of `name`, after removing what was there."""
        for path in (*self.folder.glob(name), *self.folder.glob(f"{name}[.-]*")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return str(self.folder / name)

    def once(self, function: Callable[..., dict[str, Any]], **arguments: Any) -> dict[str, Any]:
        return measured(function, self.folder, **arguments)[0][0]

    def in_turns(
        self, contenders: Contenders, rounds: int, arguments: Callable[[], dict[str, Any]]
    ) -> dict[str, list[dict[str, Any]] | str]:
        """Return the results of each contender in each round, or why there are none."""
        found: dict[str, list[dict[str, Any]] | str] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, (function, packages) in contenders.items():
                results = found[name]
                if isinstance(results, str):
                    continue
                try:
                    missing(*packages)
                    results.append(self.once(function, **arguments()))
                except NotMeasuredError as error:
                    found[name] = str(error)
        return found


def prepare(bench: Bench) -> Iterator[Row]:
    """Yield the rows of preparing."""
    yield "", "MB of text a CPU s", "of bare `tokenizers`"
    found = bench.in_turns(
        bench_data_prepare.CONTENDERS,
        bench.options.rounds,
        lambda: {"data": str(bench.folder), "out": bench.path("prepared")},
    )
    bare = found["bare tokenizers, which only encodes"]
    assert not isinstance(bare, str), bare
    for name, results in found.items():
        if isinstance(results, str):
            yield name, results, ""
            continue
        rate = median(bench.megabytes / one["seconds"] for one in results)
        share = median(base["seconds"] / one["seconds"] for one, base in zip(results, bare, strict=True))
        yield name, f"{rate:.2f}", f"{share:.2f}"


def loader(bench: Bench) -> Iterator[Row]:
    """Yield the rows of reading: the same documents in everybody's format, as often as makes `tokens`."""
    yield "", "loader processes", "first epoch, M tokens a CPU s", "later epochs", "bd3_scale's / this, later"
    prepared, flat = bench.path("once"), bench.path("flat")
    bench.once(bench_data_prepare.bd3_scale, data=str(bench.folder), out=prepared)
    bench.once(bench_data_prepare.megatron, data=str(bench.folder), out=flat)
    times = max(1, round(bench.options.tokens / (Path(f"{flat}.bin").stat().st_size / 2)))
    shards, data = len(list(Path(prepared, "train").glob("*.zstd"))), bench.path("read")
    made = bench.once(bench_data_node.multiplied, data=prepared, out=data, shards=shards * times)
    bench.once(bench_data_loader.repeated, prefix=flat, out=data, times=times)
    contenders = dict(bench_data_loader.CONTENDERS)
    try:
        missing("litdata")
        bench.once(bench_data_loader.chunks, source=data, out=f"{data}-chunks")
    except NotMeasuredError:
        pass  # said in its row, by its own try
    for workers in (0, 2):
        found = bench.in_turns(
            contenders,
            bench.options.rounds,
            lambda: {"source": data, "local": bench.path("cache"), "workers": workers},  # noqa: B023 - called at once
        )
        ours = found[next(iter(contenders))]
        for name, results in found.items():
            if isinstance(results, str) or isinstance(ours, str):
                yield name, str(workers), str(results), "", ""
                continue
            first, later = (median(one[key] for one in results) / 1e6 for key in ("first", "later"))
            ratio = median(own["later"] / one["later"] for own, one in zip(ours, results, strict=True))
            yield name, str(workers), f"{first:.1f}", f"{later:.1f}", f"{ratio:.2f}"
    size = f"{made['sequences']:,} sequences of {bench_data_prepare.SEQ_LEN} tokens"
    yield f"of {size} in {shards * times} shards", *[""] * 4


def start(bench: Bench) -> Iterator[Row]:
    """Yield the rows of starts: two ranks of a machine, two loader processes each, a cold cache."""
    yield (
        "shards of the index",
        "who",
        "s to the first batch",
        "CPU s of all ranks",
        "MiB of the machine, most",
        "then",
        "before",
    )
    template = bench.path("template")
    sizes = {"seq_len": bench_data_node.START_SEQ_LEN, "shard_bytes": bench.options.shard_bytes}
    bench.once(bench_data_node.small_shards, data=str(bench.folder), out=template, **sizes)
    for shards in bench.options.shards:
        data = bench.path("many")
        some = None if shards <= ALL_THERE else sorted(bench_data_node.read_first(template, shards))
        made = bench_data_node.multiplied(template, data, shards, some)
        for name, function in (
            ("bd3_scale", bench_data_node.bd3_scale_starts),
            ("StreamingDataset", bench_data_node.streaming_starts),
        ):
            told = f"{shards:,} ({made['bytes'] / 1e6:,.0f} MB)"
            if name != "bd3_scale" and some is not None:
                yield told, name, f"not run: its order takes {8 * made['sequences'] / 1e9:.0f} GB", *[""] * 4
                continue
            try:
                yield told, name, *_started(bench, function, data)
            except NotMeasuredError as error:
                yield told, name, str(error), *[""] * 4


def _started(bench: Bench, function: Callable[..., dict[str, Any]], data: str) -> Row:
    found, most = measured(
        function,
        bench.folder,
        ranks=RANKS,
        seconds=bench.options.seconds,
        most_mib=MOST_MIB,
        data=data,
        local=bench.path("cache"),
        meeting=bench.path("meeting"),
    )
    sums = {name: sum(rank[name] for rank in found) for name in ("cpu", "before", "after")}
    slowest, most = max(rank["seconds"] for rank in found), max(most, sums["after"])
    return f"{slowest:.1f}", f"{sums['cpu']:.1f}", f"{most:,.0f}", f"{sums['after']:,.0f}", f"{sums['before']:,.0f}"


def memory(bench: Bench) -> Iterator[Row]:
    """Yield the rows of memory by epoch."""
    yield "batches read", "a rank, RSS in MiB", "its largest loader process", "all of them, PSS"
    found = bench.once(bench_data_node.memory_kept, data=_small(bench), local=bench.path("cache"), epochs=3)
    for epoch, (rank, worker, whole) in enumerate(found["mib"]):
        done = epoch * found["steps"] or found["steps"] // 10
        yield f"{done}, epoch {max(1, epoch)}", f"{rank:.1f}", f"{worker:.1f}", f"{whole:.1f}"


def downloads(bench: Bench) -> Iterator[Row]:
    """Yield the rows of downloads: an epoch from a folder that stands for a remote, one rank."""
    yield "`data.shuffle_window`", "`data.cache_limit`", "which is", "downloads a shard", "by the order before windows"
    data = _small(bench)
    for window in bench.options.windows:
        for share in (1.0, 0.5, 0.25):
            how = {"window": window, "share": share}
            found = bench.once(bench_data_node.downloads, data=data, caches=bench.path("caches"), **how)
            yield str(window), found["limit"], found["told"], *found["orders"]


def _small(bench: Bench) -> str:
    """Return prepared data of small shards."""
    small = bench.folder / "small"
    if not small.exists():
        bench.once(
            bench_data_node.small_shards, data=str(bench.folder), out=str(small), seq_len=128, shard_bytes=1 << 14
        )
    return str(small)


def packing(bench: Bench) -> Iterator[Row]:
    """Yield the rows of packing."""
    yield "a document is", "tokens, mean", "`--document-multiple`", "`--packing`", "padding", "cut, of those that fit"
    for one in bench.once(bench_data_prepare.packed, data=str(bench.folder), out=bench.path("packed"))["rows"]:
        numbers = f"{one['tokens']:.0f}", str(one["multiple"]), one["packing"], f"{one['padding']:.1%}"
        yield one["kind"], *numbers, f"{one['cut']:.1%}"


PARTS = {
    "prepare": (prepare, "Preparing: one process, {megabytes:.1f} MB of {text}"),
    "loader": (loader, "Reading: batches of 32 sequences, in random order, from a cold cache"),
    "start": (start, f"Starting: {RANKS} ranks of a machine with {bench_data_node.WORKERS} loader processes each"),
    "memory": (memory, "Memory over epochs: one rank with two loader processes"),
    "downloads": (downloads, "Downloads: one rank, an epoch of small shards from a remote"),
    "packing": (packing, f"Packing into sequences of {bench_data_prepare.SEQ_LEN} tokens"),
}


def _versions() -> Iterator[str]:
    yield f"python {sys.version.split()[0]}"
    for name in PACKAGES:
        try:
            yield f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            yield f"{name} not installed"


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main(arguments: Sequence[str]) -> int:
    """Print a table for each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--text", type=Path, help="a folder or file; default: the sources of Python's library")
    parser.add_argument("--megabytes", type=float, default=12.0, help="of text")
    parser.add_argument("--vocab-size", type=int, default=16384, help="of the tokeniser that is trained on it")
    parser.add_argument("--tokens", type=float, default=16e6, help="to read in an epoch")
    parser.add_argument("--rounds", type=int, default=3, help="in which those that are compared take turns")
    parser.add_argument("--shards", type=_numbers, default=[10_000, 600_000], help="of indices, as 100,200")
    parser.add_argument("--shard-bytes", type=int, default=450_000, help="of each of them")
    parser.add_argument("--seconds", type=float, default=120, help="after which a start is ended")
    parser.add_argument("--windows", type=_numbers, default=[512, 2048], help="data.shuffle_window for downloads")
    options = parser.parse_args(arguments)
    print(f"- hardware: {cpu_in_words()}, one thread a process, {os.getloadavg()[0]:.1f} processes at work before")
    print(f"- versions: {', '.join(_versions())}")
    print(f"- commit: {source_commit()}")
    print(f"- command: python tools/bench_data.py {' '.join(arguments)}".rstrip())
    with tempfile.TemporaryDirectory(prefix="bd3_scale-bench-") as folder:
        bench = Bench(Path(folder), options)
        text = "text that was given" if options.text else "Python's library"
        for name in options.only or PARTS:
            rows, title = PARTS[name]
            print(f"\n### {title.format(megabytes=bench.megabytes, text=text)}\n")
            for number, cells in enumerate(rows(bench)):
                print("|", " | ".join(cells), "|", flush=True)
                if not number:
                    print("|---" * len(cells) + "|", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
