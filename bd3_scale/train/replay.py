"""Compute a step of a run again, from the checkpoint before it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from bd3_scale.checkpoint.folder import list_checkpoints, step_of
from bd3_scale.checkpoint.manifest import read_manifest
from bd3_scale.checkpoint.verify import check_checkpoint
from bd3_scale.observe.metrics import METRICS_FILE, read_metrics
from bd3_scale.parallel.collective import on_rank_zero
from bd3_scale.recipe.schema import Recipe
from bd3_scale.resilience.heartbeat import Heartbeat
from bd3_scale.resilience.terminal import tell
from bd3_scale.train.evaluation import evaluate
from bd3_scale.train.resume import Start, check_resumable, find_initial
from bd3_scale.train.setup import open_run, open_training
from bd3_scale.train.step import take_step


@dataclass(frozen=True)
class Replayed:
    """A step that was computed again, starting after `began` finished steps; recorded: loss and gradient norm of the
    run, if it has them; keys: from what its sequences and noise were drawn.
    """

    step: int
    began: int
    loss: float
    grad_norm: float
    applied: bool
    recorded: tuple[float | None, float | None] | None
    keys: dict[str, Any]

    @property
    def same(self) -> bool | None:
        """Return whether it is bitwise what the run recorded; None if the run recorded nothing."""
        if self.recorded is None:
            return None
        # Metrics hold null for a number that is not finite.
        computed = (self.loss if abs(self.loss) < float("inf") else None, self.grad_norm if self.applied else None)
        return computed == self.recorded


def replay(recipe: Recipe, step: int, heartbeat: Heartbeat) -> Replayed:
    """Compute the steps from the newest checkpoint before `step`, or from the beginning, up to `step` (collective).

    Nothing is written to the run directory. The result is bitwise the run's on the same layout and
    hardware.

    Raises:
        ValueError: the run has no such step, or its checkpoints do not fit the recipe.
    """
    with ExitStack() as stack:
        run = open_run(recipe, stack, heartbeat)
        if not 1 <= step <= run.recipe.train.steps:
            raise ValueError(f"step {step} is none of the run's {run.recipe.train.steps}")
        before = on_rank_zero(lambda: [str(path) for path in list_checkpoints(run.checkpoints)])
        order = read_manifest(Path(before[-1])).data_order if before else None
        folder = next((Path(path) for path in reversed(before) if (step_of(Path(path)) or 0) < step), None)
        if folder is None:
            start = find_initial(run.recipe, run.data)
        else:
            manifest = check_checkpoint(folder, "fast")
            check_resumable(folder, manifest, run.recipe, run.data)
            start = Start(folder, manifest, resumes=True)
        training = open_training(run, start, order)
        state, began = training.state, training.state.step
        if dist.get_rank() == 0:
            origin = folder if folder is not None else "the beginning: no checkpoint before it is left"
            tell(f"computing steps {began + 1} to {step} from {origin}")
        heartbeat.resumed(began)
        for number in range(began + 1, step + 1):
            if run.recipe.evaluates_at(state.step) and run.recipe.diffusion.search_interval:
                with heartbeat.during("evaluation"):
                    state.intervals = evaluate(training).intervals
            keys = training.keys_of(number) if number == step else {}
            result = take_step(training)
            state.finish_step(result)
            heartbeat.finished(number)
        values = on_rank_zero(lambda: _recorded(run.folder, step))
        recorded = (values[0], values[1]) if values is not None else None
        return Replayed(step, began, result.loss, result.grad_norm, result.applied, recorded, keys)


def _recorded(folder: Path, step: int) -> list[float | None] | None:
    records = read_metrics(folder / METRICS_FILE)
    return next(
        ([r["train/loss"], r.get("train/grad_norm")] for r in records if r["step"] == step and "train/loss" in r), None
    )
