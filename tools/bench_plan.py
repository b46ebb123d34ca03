"""Tabulate what `bd3-scale plan` predicts for the recipes and for other layouts of them: `python tools/bench_plan.py`.

Nothing is measured: real code runs on fake GPUs, with the assumptions of bd3_scale/plan/hardware.yaml.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # from a checkout that is not installed

from bd3_scale.observe.environment import software, source_commit
from bd3_scale.plan.commands import fake_device
from bd3_scale.plan.forecast import Forecast, forecast, layout
from bd3_scale.plan.hardware import load_hardware
from bd3_scale.recipe.load import load_recipe
from bd3_scale.recipe.vocabulary import Vocabulary

RECIPES = Path(__file__).parents[1] / "recipes"
# Recipe, number of GPUs, their type, vocabulary size, overrides.
ROWS = (
    ("paper-110m", 16, "h100", 50_258, ""),
    ("1b", 32, "h100", 50_258, ""),
    ("1b", 32, "h100", 50_258, "parallel.tensor=2 parallel.sequence=true train.micro_batch_size=2"),
    ("1b", 1, "h200", 50_258, "train.micro_batch_size=2"),
    ("8b", 64, "h100", 151_936, ""),
    ("8b", 64, "h100", 151_936, "parallel.tensor=4 parallel.pipeline=2 parallel.virtual_pipeline=3"),
    ("8b", 64, "h100", 151_936, "parallel.tensor=2 parallel.pipeline=2 parallel.virtual_pipeline=3"),
    ("32b", 256, "h100", 151_936, ""),
)
COLUMNS = ("recipe", "GPUs", "layout", "on the card, GB", "step, s", "MFU", "MFU if nothing ran beside messages")


def row(recipe: str, gpus: int, gpu: str, ids: int, values: str) -> list[str]:
    """Return the cells of a prediction."""
    vocabulary = Vocabulary(size=ids, eos_id=0, mask_id=ids - 1)
    loaded = load_recipe(RECIPES / f"{recipe}.yaml", values.split())
    prediction = forecast(loaded, vocabulary, gpus, load_hardware(gpu), device=fake_device())
    fullest = max(rank.card_bytes for rank in prediction.ranks) / 1e9
    return [
        f"{recipe}, `{values}`" if values else recipe,
        f"{gpus} {gpu.upper()}",
        layout(prediction.recipe, prediction.gpus),
        f"{fullest:.1f} of {prediction.hardware.memory_gb:g}",
        f"{prediction.time.seconds:.3g}",
        f"{prediction.time.mfu:.1%}",
        f"{mfu_without_overlap(prediction):.1%}",
    ]


def mfu_without_overlap(prediction: Forecast) -> float:
    """Return the MFU of a step in which no message overlaps with computation."""
    exposed = sum(seconds for why, seconds in prediction.time.losses.items() if why.endswith("-parallel messages"))
    return prediction.time.needed / (prediction.time.seconds + sum(prediction.time.messages.values()) - exposed)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="RECIPE", choices=sorted({name for name, *_ in ROWS}))
    options = parser.parse_args(arguments)
    versions = ", ".join(f"{name} {version}" for name, version in software().items() if name != "commit")
    print(f"- predicted, not measured; versions: {versions}")
    print(f"- commit: {source_commit()}")
    print("- command: python tools/bench_plan.py\n")
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS))
    for each in ROWS:
        if options.only in (None, each[0]):
            print("| " + " | ".join(row(*each)) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
