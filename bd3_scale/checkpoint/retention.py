"""Which checkpoints of a run are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bd3_scale.checkpoint.manifest import read_manifest
from bd3_scale.observe.metrics import METRICS_FILE, last_event, read_nelbos
from bd3_scale.recipe.schema import CheckpointRecipe


def surplus(checkpoints: Mapping[int, Path], recipe: CheckpointRecipe, run: Path) -> Sequence[Path]:
    """Those that may go, of the `checkpoints` of the folder `run` by step; never the newest that is complete."""
    steps = sorted(checkpoints)
    kept = set(steps[-recipe.keep_last :])
    if recipe.keep_every_steps:
        kept |= {step for step in steps if step % recipe.keep_every_steps == 0}
    if recipe.keep_best:
        found = read_nelbos(run / METRICS_FILE)
        kept |= set(sorted(found.keys() & checkpoints.keys(), key=lambda step: (found[step], step))[: recipe.keep_best])
    # What a replay of the last step that stood out begins with.
    if (event := last_event(run)) is not None:
        kept |= set([step for step in steps if step < event][-1:])
    newest = next((step for step in reversed(steps) if _is_complete(checkpoints[step])), None)
    return [checkpoints[step] for step in steps if step not in kept and step != newest]


def _is_complete(checkpoint: Path) -> bool:
    try:
        read_manifest(checkpoint)
    except (ValueError, OSError):
        return False
    return True
