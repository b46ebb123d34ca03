"""Time the attention against its rivals, in one process: `python tools/bench_attention.py --device cpu|cuda`.

The rivals in training, over noisy ⊕ clean rows:

- dense: PyTorch's scaled-dot-product attention with the whole 2L × 2L additive mask;
- flex: FlexAttention, compiled with a block mask (GPU);
- causal: two causal L × L attentions, the same amount of work if blocks are small. They compute something else, so
  their outputs are not compared, and their time is scaled to the mask's number of pairs.

In decoding, dense repeats the key/value heads for PyTorch's attention, and the time of that counts.

A ratio above 1 says how many times faster bd3_scale is. FLOP/s count only the mask's real pairs, in two products
forward and five backward; "of limit" is their share of what a large matrix product reaches in the same run (on a CPU in
the faster of the dtypes). In decoding, it is bytes read and written against those of a large copy. If two results of
the same attention differ, there are no numbers: the exit status is 1. Times are medians.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bd3_scale.attention.backends import ENVIRONMENT
from bd3_scale.attention.dispatch import block_attention, decode_attention
from bd3_scale.attention.reference import dense_mask
from bd3_scale.attention.spans import count_pairs, make_spans
from bd3_scale.observe.environment import cpu_in_words, read_environment, source_commit

FLOPS = {"forward": 4, "backward": 10, "both": 14}  # for each pair of the mask and channel
RESULTS = ("output", "gradient of q", "gradient of k", "gradient of v")
# Allowed difference relative to a row's norm: a few times the rounding error of the worst row of two correct results.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.04}


@dataclass(frozen=True)
class Training:
    """One call in training. `documents`: their lengths in every sequence; one document if empty."""

    dtype: torch.dtype
    batch: int
    heads: int
    groups: int
    seq_len: int
    head_dim: int
    block_size: int
    documents: tuple[int, ...] = ()

    def __str__(self) -> str:
        packed = f", {len(self.documents)} documents" if self.documents else ""
        heads = f"H{self.heads}" + f"/{self.groups}" * (self.groups != self.heads)
        shape = f"B{self.batch} {heads} L{self.seq_len} D{self.head_dim}"
        return f"{_short(self.dtype)} {shape} L'={self.block_size}{packed}"


@dataclass(frozen=True)
class Decoding:
    """One call in decoding: a block's queries on the cached keys and their own."""

    dtype: torch.dtype
    batch: int
    heads: int
    groups: int
    queries: int
    keys: int
    head_dim: int

    def __str__(self) -> str:
        shape = f"B{self.batch} H{self.heads}/{self.groups} D{self.head_dim}"
        return f"{_short(self.dtype)} {shape}, {self.queries} queries on {self.keys} keys"


FP32, BF16 = torch.float32, torch.bfloat16
Case = Training | Decoding
CASES: dict[str, list[Case]] = {
    "cpu": [
        *(Training(FP32, 1, 8, 8, 1024, 64, block_size) for block_size in (4, 16, 64, 1024)),
        Training(FP32, 1, 8, 2, 1024, 64, 16, (300, 37, 431, 256)),
        Training(FP32, 8, 4, 4, 256, 64, 8),
        Training(BF16, 1, 8, 8, 4096, 64, 16),
        Decoding(FP32, 1, 32, 8, 16, 4096, 128),
    ],
    "cuda": [
        *(Training(BF16, 8, 16, 16, 4096, 128, block_size) for block_size in (4, 16, 64, 4096)),
        Training(BF16, 8, 32, 8, 4096, 128, 16),
        Training(BF16, 8, 16, 16, 4096, 128, 16, (1100, 37, 2189, 770)),
        Training(BF16, 8, 16, 16, 4096, 64, 16),
        Training(BF16, 8, 16, 16, 4096, 256, 16),
        *(Decoding(BF16, batch, 32, 8, 16, 4096, 128) for batch in (8, 64)),
    ],
}
QUICK: dict[str, list[Case]] = {
    device: [Training(dtype, 2, 2, 1, 64, 16, 8, (40, 24)), Decoding(dtype, 1, 4, 2, 4, 64, 16)]
    for device, dtype in (("cpu", FP32), ("cuda", BF16))
}


class DifferentResultsError(Exception):
    """Says that two results of the same attention differ by more than rounding explains."""


def main(arguments: Sequence[str]) -> int:
    """Print a row for each pass of each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=CASES, required=True)
    parser.add_argument("--json", action="store_true", help="print JSON lines: the machine, then every measurement")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="also write the table into FILE, as its section on DEVICE"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes, in seconds: to see that it works, not how fast it is"
    )
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device here: use --device cpu")
    if os.environ.get(ENVIRONMENT):
        parser.error(f"${ENVIRONMENT} is set and would replace every rival: unset it")
    # As in training: PyTorch's deterministic mode would fill every new tensor with NaN, which costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    cases = (QUICK if options.quick else CASES)[options.device]
    header = describe(options.device, arguments)
    print(json.dumps(header) if options.json else f"{as_list(header)}\n\n{as_markdown([])}", flush=True)
    rows = []
    try:
        for row in measure(cases, options.device, quick=options.quick):
            print(json.dumps(row) if options.json else as_row(cells(row)), flush=True)
            rows.append(cells(row))
    except DifferentResultsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.markdown:
        write_part(options.markdown, options.device, header, rows)
    return 0


def measure(cases: Sequence[Case], device: str, *, quick: bool) -> Iterator[dict[str, Any]]:
    """Yield a row for every pass of every case, as soon as it is measured; times in milliseconds.

    `rate` and `limit` are in FLOP/s in training and in bytes per second in decoding. `rivals` holds their times by
    name, None if memory does not suffice.
    """
    clock = Clock(device, quick=quick)
    peaks = {dtype: clock.matmul_rate(dtype) for dtype in {case.dtype for case in cases}}
    if device == "cpu":
        # A CPU without 16-bit products widens the numbers, so float32's limit holds for 16-bit dtypes, too.
        peaks = dict.fromkeys(peaks, max(peaks.values()))
    for case in cases:
        torch.manual_seed(0)
        torch._dynamo.reset()  # FlexAttention is compiled for this shape alone, as in a training
        if isinstance(case, Training):
            if device == "cuda":
                choose_tiles(case)
            yield from measure_training(case, device, clock, peaks[case.dtype])
        else:
            yield measure_decoding(case, device, clock)


def choose_tiles(case: Training) -> None:
    """Tune the kernels for the case, as a training does."""
    from bd3_scale.attention.kernels.tiles import use_choices
    from bd3_scale.attention.kernels.tuning import tune

    use_choices({})
    shape = (case.batch, case.seq_len, case.heads, case.head_dim)
    for deterministic in (True, False):
        tune(shape, case.groups, case.block_size, case.dtype, torch.device("cuda"), deterministic=deterministic)


def measure_training(case: Training, device: str, clock: Clock, peak: float) -> Iterator[dict[str, Any]]:
    documents = torch.tensor(case.documents or [case.seq_len])
    starts = (documents.cumsum(0) - documents).repeat_interleave(documents)
    spans = make_spans(starts.expand(case.batch, -1), case.block_size).to(device)
    q, k, v, grad = (
        torch.randn(case.batch, 2 * case.seq_len, heads, case.head_dim, device=device, dtype=case.dtype)
        for heads in (case.heads, case.groups, case.groups, case.heads)
    )
    ours = {"": Passes(functools.partial(block_attention, spans=spans), (q, k, v), grad)}
    if device == "cuda":
        ours[", deterministic"] = Passes(ours[""].attend, (q, k, v), grad, deterministic=True)
    rivals = rivals_of(case, spans, (q, k, v), grad, ours)
    pairs = count_pairs(spans, num_noisy=1, clean_queries=True)
    causal_pairs = case.batch * case.seq_len * (case.seq_len + 1)
    for name, flops in FLOPS.items():
        everyone = {**ours, **{rival: passes for rival, passes in rivals.items() if passes}}
        times = clock.medians({who: getattr(passes, name) for who, passes in everyone.items()})
        times["causal"] *= pairs / causal_pairs
        for variant in ours if name != "forward" else [""]:
            yield {
                "case": str(case),
                "pass": name + variant,
                "ms": times[variant],
                "rate": flops * case.head_dim * case.heads * pairs / times[variant] * 1e3,
                "limit": peak,
                "rivals": {rival: times.get(rival) for rival in rivals},
            }


def rivals_of(
    case: Training, spans: Tensor, inputs: Sequence[Tensor], grad: Tensor, ours: Mapping[str, Passes]
) -> dict[str, Passes | None]:
    """Return the rivals after their results were checked against ours; None for one that does not fit in memory."""
    rivals: dict[str, Passes | None] = {}
    attentions = {"dense": dense_attention(spans, case.dtype)}
    if spans.is_cuda:
        attentions["flex"] = functools.partial(block_attention, spans=spans, backend="flex")
    for name, attend in attentions.items():
        try:
            rivals[name] = Passes(attend, inputs, grad)
            expected = rivals[name].results()
        except torch.OutOfMemoryError:
            rivals[name] = None
            continue
        for variant, passes in ours.items():
            check_equal(f"{case}{variant}", passes.results(), name, expected)
    # Two attentions would have separate streams, so the time to split one tensor must not count.
    streams = [half for x in inputs for half in x.chunk(2, 1)]
    rivals["causal"] = Passes(causal_attentions, streams, grad.chunk(2, 1))
    return rivals


class Passes:
    """Forward and backward of an attention on separate leaves, ready to be timed."""

    def __init__(
        self, attend: Callable[..., Any], inputs: Sequence[Tensor], grad: Any, *, deterministic: bool = False
    ) -> None:
        self.attend, self.grad, self.deterministic = attend, grad, deterministic
        self.leaves = [x.detach().requires_grad_() for x in inputs]
        self.out = self.forward()

    def forward(self) -> Any:
        torch.use_deterministic_algorithms(self.deterministic)
        return self.attend(*self.leaves)

    def backward(self) -> tuple[Tensor, ...]:
        torch.use_deterministic_algorithms(self.deterministic)
        return torch.autograd.grad(self.out, self.leaves, self.grad, retain_graph=True)

    def both(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), self.leaves, self.grad)

    def results(self) -> tuple[Tensor, ...]:
        return self.out.detach(), *self.backward()


def dense_attention(spans: Tensor, dtype: torch.dtype) -> Callable[..., Tensor]:
    # All sequences are packed equally. PyTorch's kernels take an additive mask; a boolean one would be converted.
    mask = dense_mask(spans[:, :1], num_noisy=1, num_keys=spans.shape[2], clean_queries=True)[:, None]
    additive = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
    return functools.partial(repeated_attention, attn_mask=additive)


def causal_attentions(*streams: Tensor) -> tuple[Tensor, Tensor]:
    q, q2, k, k2, v, v2 = streams
    return torch_attention(q, k, v, is_causal=True), torch_attention(q2, k2, v2, is_causal=True)


def torch_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Run PyTorch's attention on [batch, rows, heads, head_dim]; it shares key/value heads among queries itself."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, enable_gqa=q.shape[2] != k.shape[2], **options).transpose(1, 2)


def repeated_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Run it with repeated key/value heads: with a mask, PyTorch's fast kernels do not support fewer heads."""
    if q.shape[2] != k.shape[2]:
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    return torch_attention(q, k, v, **options)


def measure_decoding(case: Decoding, device: str, clock: Clock) -> dict[str, Any]:
    q, k, v = (
        torch.randn(case.batch, rows, heads, case.head_dim, device=device, dtype=case.dtype)
        for rows, heads in ((case.queries, case.heads), (case.keys, case.groups), (case.keys, case.groups))
    )
    check_equal(str(case), [decode_attention(q, k, v)], "dense", [repeated_attention(q, k, v)])
    times = clock.medians({"": lambda: decode_attention(q, k, v), "dense": lambda: repeated_attention(q, k, v)})
    size = sum(x.numel() * x.element_size() for x in (q, k, v, q))
    return {
        "case": str(case),
        "pass": "decode",
        "ms": times[""],
        "rate": size / times[""] * 1e3,
        "limit": clock.copy_rate(),
        "rivals": {"dense": times["dense"]},
    }


def check_equal(name: str, found: Sequence[Tensor], rival: str, expected: Sequence[Tensor]) -> None:
    """Raise DifferentResultsError if a row differs from the rival's by more than the tolerance times its norm."""
    for what, a, b in zip(RESULTS, found, expected, strict=False):
        size = b.float().norm(dim=-1)
        # A row that is nearly zero is measured against the mean norm.
        worst = ((a - b).float().norm(dim=-1) / (size + size.square().mean().sqrt())).max().item()
        if not worst <= TOLERANCE[b.dtype]:
            raise DifferentResultsError(
                f"{name}: the {what} differs from that of {rival} by {worst:.2g} of a row's norm, more than "
                f"{TOLERANCE[b.dtype]:g}: no times are given"
            )


class Clock:
    """Measures medians of the time that functions take, and the limits of the device."""

    def __init__(self, device: str, *, quick: bool) -> None:
        self.device, self.quick = device, quick

    def medians(self, functions: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """Return the median milliseconds of each function."""
        started = time.perf_counter()
        for function in functions.values():
            function()
        most = 3 if self.device == "cuda" else 25
        rounds = 1 if self.quick else min(most, max(3, int(20 / (time.perf_counter() - started))))
        # In turns, so that other load of the machine affects all of them.
        times: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(rounds):
            for name, function in functions.items():
                times[name].append(self.milliseconds(function))
        return {name: statistics.median(samples) for name, samples in times.items()}

    def milliseconds(self, function: Callable[[], object]) -> float:
        if self.device == "cuda":
            from triton.testing import do_bench

            return float(do_bench(function, warmup=25, rep=100, return_mode="median"))
        started = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - started)

    def matmul_rate(self, dtype: torch.dtype) -> float:
        """Return the FLOP/s of a large square matrix product."""
        size = 128 if self.quick else 8192 if self.device == "cuda" else 1024
        a, b = torch.randn(2, size, size, device=self.device, dtype=dtype)
        return 2 * size**3 / self.medians({"": lambda: a @ b})[""] * 1e3

    def copy_rate(self) -> float:
        """Return the bytes per second, read and written, of a large copy."""
        source = torch.empty(2**20 if self.quick else 2**30, device=self.device, dtype=torch.uint8)
        target = torch.empty_like(source)
        return 2 * len(source) / self.medians({"": lambda: target.copy_(source)})[""] * 1e3


def describe(device: str, arguments: Sequence[str]) -> dict[str, str]:
    """Return the conditions of the measurement: hardware, versions, commit and command."""
    environment = read_environment()
    gpu = f"{torch.cuda.get_device_name()}, CUDA {environment.cuda}" if device == "cuda" else ""
    versions = {name: environment.versions[name] or "none" for name in ("python", "torch", "triton")}
    return {
        "hardware": gpu or f"{cpu_in_words()}, {torch.get_num_threads()} threads",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "commit": source_commit(),
        "command": shlex.join(["python", "tools/bench_attention.py", *arguments]),
    }


COLUMNS = ("case", "pass", "time", "rate", "of limit", "dense", "flex", "causal")


def cells(row: Mapping[str, Any]) -> list[str]:
    scale, prefix = (1e12, "T") if row["rate"] >= 1e12 else (1e9, "G")
    rate = f"{row['rate'] / scale:.3g} {prefix}{'B' if row['pass'] == 'decode' else 'FLOP'}/s"
    time = f"{row['ms']:.0f} ms" if row["ms"] >= 100 else f"{row['ms']:.3g} ms"
    ratios = [ratio(row, rival) for rival in ("dense", "flex", "causal")]
    return [row["case"], row["pass"], time, rate, f"{row['rate'] / row['limit']:.0%}", *ratios]


def ratio(row: Mapping[str, Any], rival: str) -> str:
    if rival not in row["rivals"]:
        return "-"
    time = row["rivals"][rival]
    return "no memory" if time is None else f"{time / row['ms']:.2f}×"


def as_list(header: Mapping[str, str]) -> str:
    return "\n".join(f"- {key}: {value}" for key, value in header.items())


def as_row(texts: Sequence[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(map(as_row, (COLUMNS, ["---"] * len(COLUMNS), *rows)))


def write_part(path: Path, device: str, header: Mapping[str, str], rows: Sequence[Sequence[str]]) -> None:
    """Write a device's table into the file and keep those of other devices."""
    parts = {name: marked(name, unmeasured(name)) for name in CASES}
    if path.exists():
        for part in re.split(r"(?m)^## ", path.read_text())[1:]:
            name, _, body = part.partition("\n")
            parts[name] = body.strip()
    parts[device] = marked(device, f"{as_list(header)}\n\n{as_markdown(rows)}")
    body = "\n\n".join(f"## {name}\n\n{part}" for name, part in parts.items())
    path.write_text(f"# Attention\n\n{__doc__}\n{body}\n")


def marked(device: str, table: str) -> str:
    """Return a table between the marks by which tools/benchmarks.py finds it."""
    return f"<!-- begin: attention-{device} -->\n\n{table}\n\n<!-- end: attention-{device} -->"


def unmeasured(device: str) -> str:
    rows = [[str(case), "not measured", *["-"] * (len(COLUMNS) - 2)] for case in CASES[device]]
    command = f"python tools/bench_attention.py --device {device} --markdown benchmarks/attention.md"
    return f"Not measured yet; on a machine with such a device: `{command}`\n\n{as_markdown(rows)}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
