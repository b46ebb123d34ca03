"""Measures training steps: block diffusion beside next-token training (AR) of the same model, in one run.

    python tools/bench_step.py                              a small model, one process
    python tools/bench_step.py --rival                      beside the published model's step in plain PyTorch, too
    python tools/bench_step.py --preset 1b --json           a 1B model, for a GPU
    python tools/bench_step.py recipes/quickstart.yaml diffusion.block_size=4
    torchrun --nproc-per-node 8 tools/bench_step.py --preset 1b parallel.tensor=8 parallel.sequence=true

Tokens are synthetic: it needs torch, megatron-core and DeepSpeed alone, and a recipe file PyYAML, too. Throughput is in
data tokens (L a sequence, not 2L rows); MFU counts what a step needs, HFU what ran; times are medians over the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # from a checkout that is not installed

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from bd3_scale.attention.backends import choose_backend
from bd3_scale.data.batch import Batch
from bd3_scale.model.rows import ModelInputs
from bd3_scale.objective import NextToken, Objective, StepKeys, objective_of
from bd3_scale.observe.environment import has_fast_bf16, peak_cuda_bytes, peak_rss_bytes, source_commit
from bd3_scale.observe.flops import peak_flops
from bd3_scale.observe.libraries import quieten_libraries
from bd3_scale.parallel.engine import TrainingEngine, open_engine
from bd3_scale.parallel.groups import ProcessGroups, local_device, placement, process_groups
from bd3_scale.recipe.checks import check_recipe
from bd3_scale.recipe.schema import Recipe
from bd3_scale.recipe.vocabulary import Vocabulary
from bd3_scale.train.tiles import settle_tiles
from tools.plain_step import PlainStep

PRESETS: dict[str, dict[str, Any]] = {
    "small": {
        "model": {"num_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "ffn_hidden_size": 1024}
        | {"activation": "gelu_tanh", "normalization": "layernorm", "qk_norm": False},
        "data": {"path": "synthetic", "seq_len": 256},
        "train": {"steps": 1, "global_batch_size": 8, "micro_batch_size": 8},
        "vocabulary": 259,
    },
    "1b": {
        "model": {"num_layers": 16, "hidden_size": 2048, "num_attention_heads": 32, "num_query_groups": 8}
        | {"ffn_hidden_size": 8192},
        "data": {"path": "synthetic", "seq_len": 4096},
        "train": {"steps": 1, "global_batch_size": 8, "micro_batch_size": 2},
        "vocabulary": 128256,
    },
}
MakeInputs = Callable[[int], list[ModelInputs]]


def preset(name: str) -> tuple[dict[str, Any], int]:
    """A preset as a recipe's file holds it, and its vocabulary's size."""
    values = json.loads(json.dumps(PRESETS[name])) | {"name": "bench", "diffusion": {"block_size": 16}}
    return values, values.pop("vocabulary")


def load(options: argparse.Namespace) -> tuple[Recipe, int]:
    """The recipe to measure, and its vocabulary's size."""
    if options.recipe and Path(options.recipe).suffix in (".yaml", ".yml"):
        from bd3_scale.recipe.load import load_recipe, with_plugins

        return with_plugins(load_recipe(Path(options.recipe), options.overrides)), options.vocabulary or 50257
    values, vocabulary = preset(options.preset)
    for override in [*([options.recipe] if options.recipe else []), *options.overrides]:
        key, _, value = override.partition("=")
        section, _, name = key.rpartition(".")
        (values.setdefault(section, {}) if section else values)[name or key] = _parsed(value)
    return Recipe.model_validate(values), options.vocabulary or vocabulary


def _parsed(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def synthetic(recipe: Recipe, vocabulary: Vocabulary, groups: ProcessGroups, step: int) -> list[Batch]:
    """This rank's micro-batches of unpacked sequences of random tokens, as the stream would give them."""
    batch, length = recipe.train.global_batch_size, recipe.data.seq_len
    share = batch // groups.dp.size()
    slots = torch.arange(groups.dp.rank() * share, (groups.dp.rank() + 1) * share)
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, vocabulary.mask_id, (batch, length), generator=generator)[slots]
    whole = Batch(
        ids=step * batch + slots,
        slots=slots,
        epoch=0,
        tokens=tokens,
        document_start=torch.zeros(share, length, dtype=torch.int32),
        positions=torch.arange(length).expand(share, -1),
        counted=torch.ones(share, length, dtype=torch.bool),
        shown=torch.zeros(share, length, dtype=torch.bool),
    )
    return whole.split(recipe.train.micro_batch_size)


def makers(recipe: Recipe, vocabulary: Vocabulary, groups: ProcessGroups) -> dict[str, MakeInputs]:
    """How each objective makes a step's micro-batches."""

    def maker(objective: Objective) -> MakeInputs:
        return lambda step: [
            objective.training_inputs(
                micro, StepKeys(step, recipe.seed, recipe.train.global_batch_size, {}), placement(groups)
            )
            for micro in synthetic(recipe, vocabulary, groups, step)
        ]

    return {
        "bd3": maker(objective_of(recipe.diffusion, vocabulary)),
        "ar": maker(NextToken(recipe.diffusion, vocabulary)),
    }


class Phases:
    """Seconds of each phase of a step; on a GPU every phase ends with a synchronisation."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        began = self.now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - began


def measured_step(engine: TrainingEngine, make: MakeInputs, step: int, tokens: int) -> dict[str, float]:
    """One step by its phases, forward apart from backward."""
    phases = Phases(local_device())
    began: list[float] = []
    hooks = [
        handle
        for chunk in engine.chunks
        for handle in (
            chunk.register_forward_pre_hook(lambda *_: began.append(phases.now())),
            chunk.register_forward_hook(lambda *_: _add(phases, "forward", began.pop())),
        )
    ]
    start = phases.now()
    with phases.measure("data"):
        inputs = make(step)
    with phases.measure("backward"):
        engine.gradients(inputs, tokens=tokens)
    with phases.measure("optimizer"):
        engine.update(1e-4)
    phases.seconds["step"] = phases.now() - start
    for hook in hooks:
        hook.remove()
    phases.seconds["backward"] -= phases.seconds["forward"]
    return phases.seconds


def _add(phases: Phases, name: str, began: float) -> None:
    phases.seconds[name] = phases.seconds.get(name, 0.0) + phases.now() - began


def dtype_of(recipe: Recipe) -> torch.dtype:
    return torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32


def backend_of(recipe: Recipe) -> str:
    return choose_backend(recipe.attention_backend, local_device(), dtype_of(recipe), recipe.model.head_size)


def measure(
    recipe: Recipe, vocabulary: Vocabulary, groups: ProcessGroups, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each objective; their steps take turns, so that both meet the same machine."""
    engines = {}
    objectives = ("bd3", "ar") if options.objective == "both" else (options.objective,)
    for objective in objectives:
        engines[objective] = open_engine(recipe, vocabulary, groups, device=local_device(), seed=1)
    make = makers(recipe, vocabulary, groups)
    tokens = recipe.train.global_batch_size * recipe.data.seq_len
    rival = PlainStep(recipe, vocabulary.size, vocabulary.mask_id).to(local_device()) if options.rival else None
    rival_seconds = []
    seen: dict[str, list[dict[str, float]]] = {objective: [] for objective in objectives}
    ran, needed = {}, {}
    for step in range(options.warmup + options.steps):
        for objective, engine in engines.items():
            if step == 0:
                with FlopCounterMode(display=False) as counter:
                    needed[objective] = engine.step(make[objective](step), tokens=tokens, lr=1e-4).flops
                ran[objective] = float(counter.get_total_flops())
                continue
            times = measured_step(engine, make[objective], step, tokens)
            if step >= options.warmup:
                seen[objective].append(times)
        if rival is not None:
            seconds = rival_step(rival, recipe, vocabulary, groups, step)
            rival_seconds += [seconds] if step >= options.warmup else []
    peak = peak_flops(dtype_of(recipe))
    world = dist.get_world_size()
    rows = []
    for objective in objectives:
        medians = {name: statistics.median(times[name] for times in seen[objective]) for name in seen[objective][0]}
        whole = _sum_over_model(ran[objective])
        rows.append(
            {
                "objective": objective,
                "seconds": medians,
                "tokens_per_second": tokens / medians["step"],
                "flops_needed": needed[objective],
                "flops_ran": whole,
                "flops_per_second": needed[objective] / medians["step"] / world,
                "mfu": None if peak is None else needed[objective] / medians["step"] / peak / world,
                "hfu": None if peak is None else whole / medians["step"] / peak / world,
            }
        )
    if rival is not None:
        rows.append({"objective": "plain", "seconds": {"step": statistics.median(rival_seconds)}})
    return rows


def rival_step(rival: PlainStep, recipe: Recipe, vocabulary: Vocabulary, groups: ProcessGroups, step: int) -> float:
    """Seconds of the plain model on a batch of the same shape and mask rates."""
    (batch,) = synthetic(recipe, vocabulary, groups, step)
    blocks = torch.rand(len(batch.ids), recipe.data.seq_len // recipe.diffusion.block_size)
    rate = blocks.repeat_interleave(recipe.diffusion.block_size, 1)
    masked = torch.rand(rate.shape) < rate
    phases = Phases(local_device())
    began = phases.now()
    rival.step(*(x.to(local_device()) for x in (batch.tokens, masked, rate)))
    return phases.now() - began


def _sum_over_model(ran: float) -> float:
    total = torch.tensor(ran, dtype=torch.float64, device=local_device())
    dist.all_reduce(total)
    return float(total)


def conditions(recipe: Recipe, vocabulary: Vocabulary, options: argparse.Namespace) -> dict[str, Any]:
    """What a number means: hardware, versions, commit, command and shape."""
    from importlib import metadata

    device = local_device()
    alone = options.objective != "both" and not options.rival
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return {
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else cpu.partition(":")[2].strip(),
        "processes": dist.get_world_size(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("torch", "megatron-core", "deepspeed")},
        "commit": source_commit(),
        "command": " ".join(["python", "tools/bench_step.py", *sys.argv[1:]]),
        "attention": backend_of(recipe),
        "shape": recipe.model_dump(include={"model", "diffusion", "train", "parallel"}, mode="json")
        | {"seq_len": recipe.data.seq_len, "vocabulary": vocabulary.size},
        "steps": options.steps,
        "deterministic": recipe.deterministic,
        # Of one model and its optimiser, or it would be nobody's.
        "peak_rss_bytes": peak_rss_bytes() if alone else None,
        "peak_cuda_bytes": peak_cuda_bytes() if alone else None,
    }


def show(rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    """A Markdown table with its conditions."""
    shape, model = about["shape"], about["shape"]["model"]
    ranks = f"{about['processes']} process{'es' * (about['processes'] > 1)} of {about['threads']} CPU threads"
    print(f"{about['hardware']}, {ranks}, commit {about['commit']}, medians of {about['steps']} steps;")
    print(", ".join(f"{name} {version}" for name, version in about["versions"].items()) + ";")
    print(
        f"{model['num_layers']} layers, hidden {model['hidden_size']}, {model['num_attention_heads']} heads, "
        f"L={shape['seq_len']}, L'={shape['diffusion']['block_size']}, batch {shape['train']['global_batch_size']}, "
        f"{shape['train']['precision']}, vocabulary {shape['vocabulary']}, attention {about['attention']}"
        f"{', deterministic' * about['deterministic']}\n"
    )
    names = ("data", "forward", "backward", "optimizer", "step")
    print("| objective | tokens/s | " + " | ".join(f"{name}, s" for name in names) + " | TFLOP/s | MFU | HFU |")
    print("|" + "---|" * (len(names) + 5))
    by_objective = {row["objective"]: row for row in rows}
    plain = by_objective.pop("plain", None)
    for objective, row in by_objective.items():
        seconds = " | ".join(f"{row['seconds'][name]:.3f}" for name in names)
        shares = " | ".join("not known" if row[x] is None else f"{row[x]:.1%}" for x in ("mfu", "hfu"))
        speed = f"{row['tokens_per_second']:,.0f}"
        print(f"| {objective} | {speed} | {seconds} | {row['flops_per_second'] / 1e12:.3f} | {shares} |")
    print()
    bd3, ar = by_objective.get("bd3"), by_objective.get("ar")
    if bd3 and ar:
        times, flops = bd3["seconds"]["step"] / ar["seconds"]["step"], bd3["flops_ran"] / ar["flops_ran"]
        print(f"A block diffusion step takes {times:.2f} x the time of an AR step and {flops:.2f} x its FLOPs.")
    if bd3 and plain:
        seconds, times = plain["seconds"]["step"], plain["seconds"]["step"] / bd3["seconds"]["step"]
        print(f"The published model's step in plain PyTorch takes {seconds:.3f} s: {times:.2f} x the time.")
    memory = about["peak_cuda_bytes"] or about["peak_rss_bytes"]
    print(f"Peak memory {memory / 2**30:.2f} GiB." if memory else "Peak memory: see --objective bd3.")
    print(f"`{about['command']}`")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", help="a YAML file; default: the preset")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="replace recipe values")
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--objective", choices=("both", "bd3", "ar"), default="both")
    parser.add_argument("--vocabulary", type=int, help="ids, the mask included; default: the preset's, or 50257")
    parser.add_argument("--steps", type=int, default=7, help="measured steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before those")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a process")
    parser.add_argument("--rival", action="store_true", help="a plain PyTorch step, too; fp32 and one process alone")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.steps < 1 or options.warmup < 1:
        parser.error("--steps and --warmup must be at least 1")
    torch.set_num_threads(options.threads)
    quieten_libraries()
    recipe, size = load(options)
    if recipe.train.precision == "auto":
        precision = "bf16" if has_fast_bf16() else "fp32"
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": precision})})
    if options.rival and (recipe.train.precision != "fp32" or "RANK" in os.environ):
        parser.error("--rival is for one process in fp32: add train.precision=fp32, and start it without torchrun")
    vocabulary = Vocabulary(size=size, eos_id=0, mask_id=size - 1)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    check_recipe(recipe, world)
    torch.use_deterministic_algorithms(recipe.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False
    with process_groups(recipe.parallel) as groups:
        dtype = dtype_of(recipe)
        settle_tiles(recipe, backend_of(recipe), dtype, {})
        rows = measure(recipe, vocabulary, groups, options)
        about = conditions(recipe, vocabulary, options)
        if dist.get_rank() == 0 and options.json:
            print(json.dumps(about | {"rows": rows}))
        elif dist.get_rank() == 0:
            show(rows, about)


if __name__ == "__main__":
    main()
