"""Define the parts of `tools/gpu_day.py`, each of which runs in a process: `gpu_day_parts.py PART FOLDER [--dry]`.

A part yields the rows of its table. Each row is written to FOLDER/PART.rows.jsonl before the next is measured, so that
a part which is killed at its time limit leaves its results. `ok: False` and `why` in a row are a failure.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # from a checkout that is not installed

Row = dict[str, Any]
BD3_SCALE = [sys.executable, "-c", "from bd3_scale.cli import main; main()"]
# Sizes that run in seconds on a GPU, and on one CPU thread, too.
TINY = ["model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=64", "data.seq_len=64"]
TINY += ["train.precision=fp32"]
QUICK = ["--steps", "1", "--warmup", "1"]


class AbsentError(Exception):
    """Says that this machine lacks what the part needs, which is not a failure."""


class ToolError(Exception):
    """Says that a program failed; `said` is its whole output."""

    def __init__(self, returncode: int, said: Sequence[str]) -> None:
        super().__init__(f"exit code {returncode}: {said[-1].strip() if said else 'nothing was said'}")
        self.said = "".join(said)


@dataclasses.dataclass(frozen=True)
class Part:
    """A part. rows: yields rows, given the results' folder and whether the run is dry; share: seconds of ten
    minutes."""

    title: str
    share: int
    rows: Callable[[Path, bool], Iterator[Row]]


def environment(folder: Path, dry: bool) -> Iterator[Row]:
    from bd3_scale.observe.environment import read_environment

    if shutil.which("nvidia-smi"):
        asked = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
        names, *values = run(["nvidia-smi", f"--query-gpu={asked}", "--format=csv"]).splitlines()
        for index, line in enumerate(values):
            found = zip(names.split(", "), line.split(", "), strict=False)
            yield from ({"what": f"GPU {index}, {name}", "is": value} for name, value in found)
    found = read_environment()
    for index, gpu in enumerate(found.gpus):
        name = f"{gpu.name}, {gpu.memory_gib} GiB, compute capability {gpu.compute_capability}"
        yield {"what": f"GPU {index}", "is": name}
    yield {"what": "CPU", "is": f"{found.cpu}, {found.cpu_cores} cores for this process"}
    yield {"what": "system", "is": platform.platform()}
    yield {"what": "CUDA of torch", "is": found.cuda or "none"}
    for name, version in found.versions.items():
        yield {"what": name, "is": version or "not installed"}
    for acceleration in found.accelerations:
        yield {"what": acceleration.name, "is": acceleration.note}


def kernels(folder: Path, dry: bool) -> Iterator[Row]:
    # Imported here: it imports Triton, which reads TRITON_INTERPRET once, when it is imported.
    from tools.gpu_day_kernels import kernel_rows

    return kernel_rows(dry)


def fused(folder: Path, dry: bool) -> Iterator[Row]:
    from tools.gpu_day_fused import fused_rows

    return fused_rows(dry)


# Allowed relative difference of losses. On a CPU another order of addition changes the losses of these steps by less
# than 1e-7; a GPU adds in other orders everywhere and has other exponentials and roots. Steps in bf16 differ by 3e-5 to
# 4e-4.
SAME_LOSS = 1e-5


def training(folder: Path, dry: bool) -> Iterator[Row]:
    """Train 20 steps by the command line on the GPU and on the CPU, and take the last ten again from a checkpoint."""
    from tests.support.recipes import write_recipe, write_topics
    from tests.support.runs import losses, tensor_files

    work = folder / "training"
    shutil.rmtree(work, ignore_errors=True)
    write_topics(work / "text")
    run([*BD3_SCALE, "data", "prepare", "text", "--tokenizer", "bytes", "--seq-len", 64, "--out", "data"], cwd=work)
    model = {"hidden_size": 64, "num_query_groups": 2}
    recipe = write_recipe(work / "recipe.yaml", model=model, train={"steps": 20}, checkpoint={"every_steps": 10})
    on_cpu = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    # In a dry run two attention backends stand for the two devices: they add in different orders, too.
    tried = "CPU, the reference's attention" if dry else "GPU"
    runs = {"cpu": on_cpu, "gpu": on_cpu | {"BD3_SCALE_ATTENTION": "reference"} if dry else {}}
    for name, variables in runs.items():
        run([*BD3_SCALE, "train", recipe, f"name={name}"], cwd=work, env=variables)
    cpu, gpu = (losses(work / "runs" / name) for name in runs)
    for step, (loss, norm) in cpu.items():
        other, other_norm = gpu[step]
        row = {"step": step, "CPU": f"{loss:.7f}", tried: f"{other:.7f}", "difference": abs(other - loss) / loss}
        row["of the gradient's norm"] = abs(other_norm - norm) / norm
        differs = not row["difference"] <= SAME_LOSS
        yield row | ({"ok": False, "why": f"more than {SAME_LOSS:g} of the loss"} if differs else {})
    files = tensor_files(work / "runs/gpu", 20)
    shutil.rmtree(work / "runs/gpu/checkpoints/step-00000020")
    run([*BD3_SCALE, "train", recipe, "name=gpu"], cwd=work, env=runs["gpu"])
    same = losses(work / "runs/gpu") == gpu and tensor_files(work / "runs/gpu", 20) == files
    row = {"step": "11 to 20 again, from the checkpoint of step 10", tried: "bitwise the same" if same else "different"}
    yield row if same else row | {"ok": False, "why": "a resumed run is not the one that went on"}


def tuning(folder: Path, dry: bool) -> Iterator[Row]:
    """Time each tile as the kernels' tuning does."""
    import torch
    from triton.testing import do_bench

    from bd3_scale.attention.kernels.tiles import choices, use_choices
    from bd3_scale.attention.kernels.tuning import tune

    device, dtype = torch.device("cpu" if dry else "cuda"), torch.float32 if dry else torch.bfloat16
    # Batch, seq_len, query heads and head_dim; key heads; block size.
    shapes = [((1, 16, 2, 16), 1, 4)] if dry else [((2, 4096, 32, 64), 8, 16), ((2, 4096, 16, 128), 8, 16)]
    shapes += [] if dry else [((8, 1024, 12, 64), 12, 4), ((2, 4096, 8, 256), 4, 16)]
    for (shape, groups, block_size), deterministic in itertools.product(shapes, (True, False)):
        if deterministic:
            use_choices({})
        times: dict[tuple[str, tuple[int, ...]], float] = {}

        def milliseconds(call: Callable[[], None], times: dict = times) -> float:
            # The kernel that is being tuned was the last one whose tile was set.
            name, tile = list(choices().items())[-1]
            began = time.perf_counter()
            took = call() if dry else do_bench(call, return_mode="median")
            times[name, tuple(tile)] = 1e3 * (time.perf_counter() - began) if took is None else float(took)
            return times[name, tuple(tile)]

        chosen = tune(shape, groups, block_size, dtype, device, deterministic=deterministic, measure=milliseconds)
        for (name, tile), took in times.items():
            row = {"batch, L, heads, head_dim": str(shape), "key heads": groups, "L'": block_size, "kernel": name}
            yield row | {
                "rows, keys, warps, stages": str(tile),
                "ms": took,
                "chosen": "yes" * (chosen[name] == list(tile)),
            }


def attention(folder: Path, dry: bool) -> Iterator[Row]:
    how = ["--device", "cpu", "--quick"] if dry else ["--device", "cuda"]
    how += ["--json", "--markdown", folder / "attention.md"]
    for found in objects(lines([sys.executable, "tools/bench_attention.py", *how])):
        if "case" in found:
            rivals = {f"{name}, ×": took and took / found["ms"] for name, took in found["rivals"].items()}
            speed = {"TFLOP/s or TB/s": found["rate"] / 1e12, "of limit": found["rate"] / found["limit"]}
            yield {"case": found["case"], "pass": found["pass"], "ms": found["ms"]} | speed | rivals


def step(folder: Path, dry: bool) -> Iterator[Row]:
    yield from step_rows(bench_step([*TINY, *QUICK] if dry else ["--preset", "1b"]))


def bench_step(arguments: Sequence[object]) -> Row:
    return next(objects(run([sys.executable, "tools/bench_step.py", *arguments, "--json"]).splitlines()))


def step_rows(found: Row) -> Iterator[Row]:
    for row in found["rows"]:
        seconds = {f"{name}, s": took for name, took in row["seconds"].items()}
        speed = {"tokens/s": row["tokens_per_second"], "TFLOP/s": row["flops_per_second"] / 1e12}
        yield {"objective": row["objective"]} | speed | seconds | {"MFU": row["mfu"], "HFU": row["hfu"]}


def decoding(folder: Path, dry: bool) -> Iterator[Row]:
    ways = [["--tokens", 15, "--repeats", 1]] if dry else [["--preset", "1b", "--tokens", 255], ["--tokens", 255]]
    for how in ways:
        said = run([sys.executable, "tools/bench_generate.py", *how, "--json"])
        preset = "1b" if "1b" in how else "small"
        for name, speed in next(objects(said.splitlines()))["tokens_per_second"].items():
            yield {"model": preset, "what": name, "tokens/s": speed}


# Allowed relative error of a predicted memory peak.
PEAK_TOLERANCE = 0.05


def memory(folder: Path, dry: bool) -> Iterator[Row]:
    """Measure the memory peak of a 1B model's step at several micro-batches, and compare `bd3-scale plan`."""
    import yaml

    from tools.bench_step import preset

    values, vocabulary = preset("small" if dry else "1b")
    recipe = folder / "memory.yaml"
    recipe.write_text(yaml.safe_dump(values))
    common = [recipe, *(TINY if dry else ["train.precision=bf16"])]
    card = None if dry else memory_of_the_card()
    last = ["--vocabulary", vocabulary]
    sizes = (2,) if dry else (2, 8, 4, 1)
    cases = {micro: [*common, f"train.micro_batch_size={micro}", *last] for micro in sizes}
    # Plans take as long as measurements; run them meanwhile, since times do not matter here.
    with ThreadPoolExecutor() as pool:
        plans = {micro: pool.submit(plan, arguments) for micro, arguments in cases.items()}
        for micro, arguments in cases.items():
            measured = peak_of(arguments)
            (planned,) = plans[micro].result()["ranks"]
            yield {"micro-batch": micro, "predicted, GB": planned["peak_bytes"] / 1e9} | against(
                planned, measured, card
            )


def plan(arguments: Sequence[object]) -> Row:
    words = [*BD3_SCALE, "plan", *map(str, arguments), "--gpus", "1", "--json"]
    done = subprocess.run(words, cwd=ROOT, text=True, capture_output=True, check=False)
    print(done.stdout, done.stderr, flush=True)
    # Exit code 1 with a plan means that it does not fit the planned GPU, which need not be the one of this machine.
    if not done.stdout.startswith("{"):
        raise ToolError(done.returncode, done.stderr.splitlines())
    return json.loads(done.stdout)


def peak_of(arguments: Sequence[object]) -> Row | None:
    """Return the result of `bench_step`, or None if memory did not suffice."""
    try:
        return bench_step([*arguments, "--objective", "bd3", *QUICK])
    except ToolError as error:
        if "OutOfMemoryError" not in error.said:
            raise
        return None


def against(planned: Row, measured: Row | None, card: int | None) -> Row:
    """Compare a prediction with a measurement; without a verdict on a CPU, where memory is counted differently."""
    if card is None:
        return {"resident on this CPU, GB": measured and measured["peak_rss_bytes"] / 1e9}
    if measured is None:
        row: Row = {"measured, GB": "out of memory", "predicted / measured": None}
        fits = planned["card_bytes"] <= card
        return row | {"ok": False, "why": f"predicted to fit the card's {card / 1e9:.1f} GB"} if fits else row
    ratio = planned["peak_bytes"] / measured["peak_cuda_bytes"]
    row = {"measured, GB": measured["peak_cuda_bytes"] / 1e9, "predicted / measured": ratio}
    return (
        row
        if abs(ratio - 1) <= PEAK_TOLERANCE
        else row | {"ok": False, "why": f"off by more than {PEAK_TOLERANCE:.0%}"}
    )


def memory_of_the_card() -> int:
    import torch

    return torch.cuda.get_device_properties(0).total_memory


def sanitizer(folder: Path, dry: bool) -> Iterator[Row]:
    found = shutil.which("compute-sanitizer")
    if found is None:
        raise AbsentError("compute-sanitizer is not on the PATH")
    from tests.attention.test_kernels_gpu import found_nothing, sanitized

    watched = {"attention": "exercise_one_form", "fused": "exercise_every_kernel"}
    for tool, (room, function) in itertools.product(("memcheck", "racecheck"), watched.items()):
        program = sanitized(found, tool, function, room)
        said = run(program["args"], env=program["env"])
        clean = found_nothing(said)
        row = {"tool": tool, "kernels": room, "found": "nothing" if clean else "see the log"}
        yield row if clean else row | {"ok": False, "why": "no line says that there were 0 errors or hazards"}


PARTS = {
    "environment": Part("Environment", 20, environment),
    "kernels": Part("Attention kernels against float64", 90, kernels),
    "fused": Part("Kernels between products: against float64, plain PyTorch and a copy", 40, fused),
    "training": Part("20 steps on GPU and CPU", 85, training),
    "tuning": Part("Tiles", 40, tuning),
    "attention": Part("Attention beside its rivals", 90, attention),
    "step": Part("A step of the 1B model, next-token training beside it", 80, step),
    "decoding": Part("Decoding", 40, decoding),
    "memory": Part("Memory against the plan", 70, memory),
    "sanitizer": Part("compute-sanitizer", 45, sanitizer),
}
# Parts whose kernels run in Triton's interpreter in a dry run.
INTERPRETED = ("kernels", "fused", "tuning")


def lines(command: Sequence[object], cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> Iterator[str]:
    """Yield the output lines of a program, and copy them to the part's log. ToolError: it failed."""
    words = [str(word) for word in command]
    print("$", *words, flush=True)
    environment = {**os.environ, **(env or {})}
    said = []
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(words, **both, text=True, cwd=cwd, env=environment) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            said.append(line)
            yield line
    if process.returncode:
        raise ToolError(process.returncode, said)


def objects(said: Iterable[str]) -> Iterator[Row]:
    """Yield the JSON lines of a program's output."""
    return (json.loads(line) for line in said if line.startswith("{"))


def run(command: Sequence[object], cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> str:
    """Return the output of a program as one text; see `lines`."""
    return "".join(lines(command, cwd, env))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    # On SIGTERM print where every thread is: a part that exceeds its time shows what it was doing.
    faulthandler.register(signal.SIGTERM, all_threads=True, chain=True)
    if options.dry and options.part in INTERPRETED:
        os.environ["TRITON_INTERPRET"] = "1"
    failed = False
    with (options.folder / f"{options.part}.rows.jsonl").open("w", buffering=1) as file:
        try:
            if not options.dry:
                check_gpu()
            for row in PARTS[options.part].rows(options.folder.resolve(), options.dry):
                file.write(json.dumps({"row": row}) + "\n")
                failed |= not row.get("ok", True)
        except AbsentError as error:
            file.write(json.dumps({"absent": str(error)}) + "\n")
    return int(failed)


def check_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("PyTorch finds no CUDA device here: --dry is for a machine without one")


if __name__ == "__main__":
    sys.exit(main())
