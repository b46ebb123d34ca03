"""Measure training steps: block diffusion against next-token training (AR) of the same model, in one run.

    python tools/bench_step.py                              a small model, one process
    python tools/bench_step.py --rival                      also compare each with plain PyTorch (`plain_step`)
    python tools/bench_step.py --rival --objective all --shapes 256/16/8,1024/16/2 --precisions fp32,bf16
    python tools/bench_step.py --preset 1b --json           a 1B model, for a GPU
    python tools/bench_step.py recipes/quickstart.yaml diffusion.block_size=4
    torchrun --nproc-per-node 8 tools/bench_step.py --preset 1b parallel.tensor=8 parallel.sequence=true

Tokens are synthetic: it needs only torch, megatron-core and DeepSpeed, and PyYAML for a recipe file. Throughput is in
data tokens (L per sequence, not 2L rows); MFU counts the FLOPs that a step needs, HFU those that ran; times are medians
over the steps. CPU seconds are those of all threads of the process: on a shared machine they say more than wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # from a checkout that is not installed

import torch
import torch.distributed as dist

from bd3_scale import processor
from bd3_scale.attention.backends import choose_backend
from bd3_scale.model.products import fp32_library
from bd3_scale.observe.environment import has_fast_bf16, peak_cuda_bytes, peak_rss_bytes, source_commit
from bd3_scale.observe.libraries import quieten_libraries
from bd3_scale.parallel.groups import local_device, process_groups
from bd3_scale.recipe.checks import check_recipe
from bd3_scale.recipe.schema import Recipe
from bd3_scale.recipe.vocabulary import Vocabulary
from bd3_scale.train.tiles import resolve_tiles
from tools.plain_step import PUBLISHED_DROPOUT, obstacles
from tools.step_timing import Case, open_case, rows_of, take_turns

OBJECTIVES = {"both": ("bd3", "ar"), "all": ("bd3", "mdlm", "ar")} | {name: (name,) for name in ("bd3", "mdlm", "ar")}
# The CPU flags that decide how matrix products run.
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
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


def preset(name: str) -> tuple[dict[str, Any], int]:
    """Return a preset in the form of a recipe file, and its vocabulary size."""
    values = json.loads(json.dumps(PRESETS[name])) | {"name": "bench", "diffusion": {"block_size": 16}}
    return values, values.pop("vocabulary")


def load(options: argparse.Namespace) -> tuple[Recipe, int]:
    """Return the recipe to measure, and its vocabulary size."""
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


def dtype_of(recipe: Recipe) -> torch.dtype:
    return torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32


def backend_of(recipe: Recipe) -> str:
    return choose_backend(recipe.attention_backend, local_device(), dtype_of(recipe), recipe.model.head_size)


def cases_of(recipe: Recipe, options: argparse.Namespace) -> Iterator[Recipe]:
    """Yield the recipe in every requested precision and shape, or unchanged."""
    for precision in options.precisions or (recipe.train.precision,):
        if precision == "auto":
            precision = "bf16" if has_fast_bf16() else "fp32"
        for length, block, batch in options.shapes or [(recipe.data.seq_len, recipe.diffusion.block_size, None)]:
            train = {"precision": precision}
            train |= {} if batch is None else {"global_batch_size": batch, "micro_batch_size": batch}
            yield recipe.model_copy(
                update={
                    "train": recipe.train.model_copy(update=train),
                    "data": recipe.data.model_copy(update={"seq_len": length}),
                    "diffusion": recipe.diffusion.model_copy(update={"block_size": block}),
                }
            )


def conditions(recipe: Recipe, vocabulary: Vocabulary, options: argparse.Namespace, alone: bool) -> dict[str, Any]:
    """Return the conditions of the numbers: hardware, versions, commit, command and shape; `alone`: one contender
    ran."""
    from importlib import metadata

    device = local_device()
    return {
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else processor.fields().get("model name", ""),
        "cpu_flags": [flag for flag in FLAGS if flag in processor.flags()],
        "processes": dist.get_world_size(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("torch", "megatron-core", "deepspeed")},
        "commit": source_commit(),
        "command": " ".join(["python", "tools/bench_step.py", *sys.argv[1:]]),
        "attention": backend_of(recipe),
        "fp32_products": fp32_library(),
        "shape": recipe.model_dump(include={"model", "diffusion", "train", "parallel"}, mode="json")
        | {"seq_len": recipe.data.seq_len, "vocabulary": vocabulary.size},
        "steps": options.steps,
        "deterministic": recipe.deterministic,
        # Peak memory means something only if one model and its optimiser ran.
        "peak_rss_bytes": peak_rss_bytes() if alone else None,
        "peak_cuda_bytes": peak_cuda_bytes() if alone else None,
    }


def show_machine(about: dict[str, Any]) -> None:
    """Print the conditions that all tables of a run share."""
    ranks = f"{about['processes']} process{'es' * (about['processes'] > 1)} of {about['threads']} CPU threads"
    flags = ", ".join(about["cpu_flags"]) or "no avx2"
    print(f"{about['hardware']} ({flags}), {ranks}, commit {about['commit']}, medians of {about['steps']} steps;")
    print(", ".join(f"{name} {version}" for name, version in about["versions"].items()) + ",", end=" ")
    print(f"fp32 products by {about['fp32_products']}, the rivals' by PyTorch's own choice;")
    print(f"`{about['command']}`\n")


def show(rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    """Print a Markdown table of a case, with its shape."""
    shape, model = about["shape"], about["shape"]["model"]
    print(
        f"{model['num_layers']} layers, hidden {model['hidden_size']}, {model['num_attention_heads']} heads, "
        f"L={shape['seq_len']}, L'={shape['diffusion']['block_size']}, batch {shape['train']['global_batch_size']}, "
        f"{shape['train']['precision']}, vocabulary {shape['vocabulary']}, attention {about['attention']}"
        f"{', deterministic' * about['deterministic']}\n"
    )
    names = ("data", "forward", "backward", "optimizer", "step")
    columns = ["tokens/s", *(f"{name}, s" for name in names), "CPU s", "plain / ours", "TFLOP/s", "MFU", "HFU"]
    print(f"| objective | {' | '.join(columns)} |")
    print("|" + "---|" * (len(columns) + 1))
    by_objective = {row["objective"]: row for row in rows}
    for objective, row in by_objective.items():
        ours = by_objective[objective.removeprefix("plain ").partition(",")[0]]
        cells = [f"{row['tokens_per_second']:,.0f}"]
        cells += [f"{row['seconds'][name]:.4f}" if name in row["seconds"] else "" for name in names]
        cells += [f"{row['cpu_seconds']:.4f}"]
        if row is ours:
            cells += ["", f"{row['flops_per_second'] / 1e12:.3f}"]
            cells += ["not known" if row[x] is None else f"{row[x]:.1%}" for x in ("mfu", "hfu")]
        else:
            cells += [f"{row['cpu_seconds'] / ours['cpu_seconds']:.2f}", "", "", ""]
        print(f"| {objective} | {' | '.join(cells)} |")
    print()
    bd3, ar = by_objective.get("bd3"), by_objective.get("ar")
    if bd3 and ar:
        on_gpu = torch.cuda.is_available()
        times = bd3["seconds"]["step"] / ar["seconds"]["step"] if on_gpu else bd3["cpu_seconds"] / ar["cpu_seconds"]
        flops = bd3["flops_ran"] / ar["flops_ran"]
        time = "time" if on_gpu else "CPU time"
        print(f"A block diffusion step takes {times:.2f} x the {time} of an AR step and {flops:.2f} x its FLOPs.")
    memory = about["peak_cuda_bytes"] or about["peak_rss_bytes"]
    print(f"Peak memory {memory / 2**30:.2f} GiB.\n" if memory else "Peak memory: see --objective bd3.\n")


def shapes_of(text: str) -> list[tuple[int, ...]]:
    shapes = [tuple(int(number) for number in shape.split("/")) for shape in text.split(",")]
    if any(len(shape) != 3 for shape in shapes):
        raise argparse.ArgumentTypeError(f"{text!r} is not L/L'/batch, or several of them with commas between")
    return shapes


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", help="a YAML file; default: the preset")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="replace recipe values")
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--objective", choices=OBJECTIVES, default="both")
    parser.add_argument("--shapes", type=shapes_of, metavar="L/L'/BATCH", help="several with commas between")
    parser.add_argument("--precisions", type=lambda text: text.split(","), help="fp32, bf16 or both, with a comma")
    parser.add_argument("--vocabulary", type=int, help="ids, the mask included; default: the preset's, or 50257")
    parser.add_argument("--steps", type=int, default=7, help="measured steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before those")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a process")
    parser.add_argument("--rival", action="store_true", help="plain PyTorch steps, too, without dropout; one process")
    parser.add_argument("--dropout", action="store_true", help=f"and with the published {PUBLISHED_DROPOUT}")
    parser.add_argument("--json", action="store_true", help="a line for each shape and precision")
    options = parser.parse_args()
    if options.steps < 1 or options.warmup < 1:
        parser.error("--steps and --warmup must be at least 1")
    options.dropouts = [0.0] * options.rival + [PUBLISHED_DROPOUT] * options.dropout
    if options.dropouts and "RANK" in os.environ:
        parser.error("--rival is for one process: start it without torchrun")
    options.error = parser.error
    return options


def main() -> None:
    options = parsed_options()
    torch.set_num_threads(options.threads)
    quieten_libraries()
    recipe, size = load(options)
    vocabulary = Vocabulary(size=size, eos_id=0, mask_id=size - 1)
    recipes = list(cases_of(recipe, options))
    for each in recipes:
        check_recipe(each, int(os.environ.get("WORLD_SIZE", "1")))
        if options.dropouts and (without := list(obstacles(each))):
            options.error(f"the rival does not have {', '.join(without)}: leave out --rival, or use --preset small")
    torch.use_deterministic_algorithms(recipe.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False
    with process_groups(recipe.parallel) as groups:
        for each in recipes:
            resolve_tiles(each, backend_of(each), dtype_of(each), {})
        objectives = OBJECTIVES[options.objective]
        cases = [open_case(each, vocabulary, groups, objectives, options.dropouts) for each in recipes]
        take_turns(cases, warmup=options.warmup, steps=options.steps)
        report(cases, vocabulary, options)


def report(cases: Sequence[Case], vocabulary: Vocabulary, options: argparse.Namespace) -> None:
    """Print the results, on rank 0 (collective)."""
    alone = len(cases) == len(cases[0].contenders) == 1
    for index, case in enumerate(cases):
        rows = rows_of(case, dtype_of(case.recipe))
        about = conditions(case.recipe, vocabulary, options, alone)
        if dist.get_rank() == 0 and options.json:
            print(json.dumps(about | {"rows": rows}))
        elif dist.get_rank() == 0:
            if index == 0:
                show_machine(about)
            show(rows, about)


if __name__ == "__main__":
    main()
