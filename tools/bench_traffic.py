"""Count what a micro-batch needs of a GPU besides its products, on fake devices: no GPU is needed, and nothing is
timed.

    python tools/bench_traffic.py                  a table in Markdown
    python tools/bench_traffic.py --json           the same numbers
    python tools/bench_traffic.py --only 8b        only shapes whose name contains this

For the real step of each shape: memory traffic (bytes that kernels read and write) and kernel launches of a
micro-batch, bytes that a layer keeps for backward per row and channel, and the MFU that `bd3-scale plan` predicts from
both.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # from a checkout that is not installed

import torch

from bd3_scale.observe.environment import source_commit
from bd3_scale.plan.forecast import assemble, trace_stages, with_gpu_precision
from bd3_scale.plan.hardware import load_hardware
from bd3_scale.plan.job import Job
from bd3_scale.plan.trace import Trace
from bd3_scale.plan.workers import trace_all
from bd3_scale.recipe.load import load_recipe
from bd3_scale.recipe.schema import Recipe
from bd3_scale.recipe.vocabulary import Vocabulary

RECIPES = Path(__file__).parents[1] / "recipes"
# Kernels whose traffic no fusion can avoid.
PRODUCTS = ("mm", "addmm", "block_attention", "block_attention_backward")


@dataclass(frozen=True)
class Shape:
    """A recipe with overrides on some GPUs."""

    recipe: str
    overrides: tuple[str, ...]
    gpus: int
    card: str
    vocabulary: int


SHAPES = {
    "1b on one H200": Shape("1b", ("train.micro_batch_size=2", "parallel.tensor=1"), 1, "h200", 50258),
    "1b on one H200, not deterministic": Shape(
        "1b", ("train.micro_batch_size=2", "parallel.tensor=1", "deterministic=false"), 1, "h200", 50258
    ),
    "8b on 64, tensor 4": Shape("8b", ("parallel.tensor=4", "train.micro_batch_size=1"), 64, "h100", 151936),
    "8b on 64, tensor 2": Shape("8b", ("parallel.tensor=2", "train.micro_batch_size=1"), 64, "h100", 151936),
    "paper-110m on 16": Shape("paper-110m", (), 16, "h100", 50258),
}


def measure(shape: Shape) -> dict[str, Any]:
    """Return the figures of a shape; bytes and launches are those of one micro-batch on one rank."""
    recipe = with_gpu_precision(load_recipe(RECIPES / f"{shape.recipe}.yaml", shape.overrides))
    vocabulary = Vocabulary(size=shape.vocabulary, eos_id=0, mask_id=shape.vocabulary - 1)
    hardware = load_hardware(shape.card)
    traces = trace_stages(recipe, vocabulary, shape.gpus, hardware, device="cuda")
    (trace,) = traces.values()
    prediction = assemble(recipe, vocabulary, shape.gpus, hardware, traces)
    inside = {key: work for key, work in trace.work.items() if key.phase == "gradients" and key.part}
    of_products = sum(work.bytes for key, work in inside.items() if key.name in PRODUCTS)
    return {
        "traffic_bytes": sum(work.bytes for work in inside.values()) / trace.micro_batches,
        "product_bytes": of_products / trace.micro_batches,
        "launches": sum(work.calls for work in inside.values()) / trace.micro_batches,
        "kept_bytes": kept_bytes(recipe, vocabulary, shape),
        "step_seconds": prediction.time.seconds,
        "mfu": prediction.time.mfu,
        "waits": prediction.waits,
    }


def kept_bytes(recipe: Recipe, vocabulary: Vocabulary, shape: Shape) -> float:
    """Return what one more layer keeps, in bytes per row of both streams and per channel of this rank's share."""
    model, train = recipe.model, recipe.train

    def peak(layers: int) -> float:
        small = recipe.model_copy(update={"model": model.model_copy(update={"num_layers": layers})})
        job = Job(small, vocabulary, 0, shape.gpus, micro_batches=1)
        (trace,) = trace_all([replace(job, recipe=small)], load_hardware(shape.card), device="cuda")
        return max(kept(trace))

    def kept(trace: Trace) -> Iterator[float]:
        for segment in trace.segments:
            if segment.name == "head forward":
                yield segment.memory.get("activations", 0.0)

    rows = 2 * recipe.data.seq_len * train.micro_batch_size
    return (peak(4) - peak(3)) / (rows * model.hidden_size / recipe.parallel.tensor)


def show(rows: dict[str, dict[str, Any]]) -> None:
    """Print a table in Markdown with its conditions."""
    print(f"Commit {source_commit()}, torch {torch.__version__}; `python tools/bench_traffic.py`. Counted, not timed;")
    print("the MFU is predicted at the assumptions of `bd3_scale/plan/hardware.yaml`.\n")
    columns = ("GB moved", "by products and attention", "launches", "bytes kept by row, channel and layer", "step, s")
    print(" | ".join(("| shape", *columns, "MFU |")) + "\n|" + "---|" * 7)
    for name, row in rows.items():
        kept, seconds = f"{row['kept_bytes']:.1f}", f"{row['step_seconds']:.3g}"
        print(
            f"| {name} | {row['traffic_bytes'] / 1e9:,.1f} | {row['product_bytes'] / 1e9:,.1f} | "
            f"{row['launches']:,.0f} | {kept} | {seconds} | "
            f"{row['mfu']:.1%} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="of the shapes whose name contains it")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = {name: measure(shape) for name, shape in SHAPES.items() if options.only in name}
    if not rows:
        parser.error(f"no shape's name contains {options.only!r}: {', '.join(SHAPES)}")
    if options.json:
        print(json.dumps({"commit": source_commit(), "torch": torch.__version__, "rows": rows}))
    else:
        show(rows)


if __name__ == "__main__":
    main()
