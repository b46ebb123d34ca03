"""Renew the comments of recipes about memory and speed of their layouts, as `bd3-scale plan` predicts them.

    python tools/recipe_comments.py                    all recipes that have such comments
    python tools/recipe_comments.py recipes/8b.yaml
    python tools/recipe_comments.py --check            exit status 1 if a comment is outdated

It reads `# vocabulary: 50258 …`, and `# on 4 x 8: …` (nodes x GPUs) or `# on 4 x 8 with KEY=VALUE …: …`. The text
behind the colon of the latter is replaced, with the comment's next line, and so is the line `# parameters: …`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # from a checkout that is not installed

from bd3_scale.plan.commands import fake_device
from bd3_scale.plan.forecast import Forecast, forecast, layout
from bd3_scale.plan.hardware import load_hardware
from bd3_scale.recipe.load import load_recipe
from bd3_scale.recipe.vocabulary import Vocabulary
from bd3_scale.resilience.files import write_atomically

RECIPES = Path(__file__).parents[1] / "recipes"
GPU = "h100"
_ON = re.compile(
    r"^# on (?P<nodes>\d+) x (?P<gpus>\d+)(?: with (?P<values>[^:]+))?:.*\n(?:#   on a GPU .*\n)?", re.MULTILINE
)
_PARAMETERS = re.compile(r"^# parameters: .*$", re.MULTILINE)
_VOCABULARY = re.compile(r"^# vocabulary: (\d+)", re.MULTILINE)


def has_comments(path: Path) -> bool:
    """Tell whether a recipe has comments to renew."""
    return bool(_ON.search(path.read_text()))


def renewed(path: Path) -> str:
    """Return the text of a recipe with its comments as they are predicted now. ValueError: it names no vocabulary."""
    text = path.read_text()
    size = _VOCABULARY.search(text)
    if size is None:
        raise ValueError(f"{path} has no line `# vocabulary: SIZE`")
    vocabulary = Vocabulary(size=int(size[1]), eos_id=0, mask_id=int(size[1]) - 1)
    hardware, device = load_hardware(GPU), fake_device()
    parameters = 0

    def renew(found: re.Match[str]) -> str:
        nonlocal parameters
        recipe = load_recipe(path, (found["values"] or "").split())
        prediction = forecast(recipe, vocabulary, int(found["nodes"]) * int(found["gpus"]), hardware, device=device)
        parameters = prediction.parameters
        values = f" with {found['values']}" if found["values"] else ""
        return f"# on {found['nodes']} x {found['gpus']}{values}: {lines(prediction)}"

    text = _ON.sub(renew, text)
    return _PARAMETERS.sub(f"# parameters: {parameters / 1e9:.3g} B", text)


def lines(prediction: Forecast) -> str:
    """Return a forecast as two lines of a comment, without the beginning of the first."""
    fullest = max(prediction.ranks, key=lambda rank: rank.card_bytes)
    most = ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in list(fullest.memory.items())[:3])
    return (
        f"{layout(prediction.recipe, prediction.gpus)}\n"
        f"#   on a GPU {fullest.card_bytes / 1e9:.1f} of {prediction.hardware.memory_gb:g} GB ({most}); "
        f"{prediction.time.seconds:.2f} s a step, {prediction.tokens_per_second / 1e3:,.0f} thousand tokens/s, "
        f"MFU {prediction.time.mfu:.0%}\n"
    )


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", type=Path, help="default: all")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    outdated = 0
    for path in options.recipes or sorted(filter(has_comments, RECIPES.glob("*.yaml"))):
        text = renewed(path)
        if text != path.read_text():
            outdated += 1
            print(f"{path}: {'not ' * options.check}renewed")
            if not options.check:
                write_atomically(path, text)
    return bool(options.check and outdated)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
