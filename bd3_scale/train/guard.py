"""What is done about steps that go wrong: gradients that are not finite, losses that stand out."""

from __future__ import annotations

import itertools
import json
import math
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch.distributed as dist

from bd3_scale.observe.metrics import EVENTS_FILE, METRICS_FILE, RESUMED, read_metrics, truncate_after
from bd3_scale.parallel.collective import on_rank_zero
from bd3_scale.parallel.engine import StepResult
from bd3_scale.recipe.schema import GuardRecipe
from bd3_scale.resilience.files import Lines

Keys = Callable[[], dict[str, Any]]
_WINDOW = 128
_FEWEST = 32
_RECENT = 16
# Of a normal law, standard deviations a median absolute deviation.
_DEVIATION = 1.4826


class Guard:
    """Judges every step, and keeps a record of those that stood out; `step`: those that were taken before."""

    def __init__(self, folder: Path, recipe: GuardRecipe, *, step: int) -> None:
        self._folder, self._recipe = folder, recipe
        self._in_a_row = 0
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._events: Lines | None = None
        self._losses.extend(on_rank_zero(lambda: _losses_so_far(folder, step)))

    def judge(self, step: int, result: StepResult, keys: Keys) -> str | None:
        """After a step: what people should know of it. `keys`: what its sequences and noise are drawn from.

        FloatingPointError, on all ranks: too many steps in a row were left out, or the loss is not finite although the
        gradients are.
        """
        if result.applied:
            self._in_a_row = 0
            if not math.isfinite(result.loss):
                raise FloatingPointError(f"step {step} has loss {result.loss} with finite gradients: {_ADVICE}")
            return self._spike(step, result, keys)
        self._in_a_row += 1
        self._note("non_finite", step, result, keys)
        if self._in_a_row > self._recipe.skip_steps:
            raise FloatingPointError(
                f"{self._in_a_row} steps in a row had gradients that are not finite, the last one step {step} with "
                f"loss {result.loss:g}; the weights are those before. {_ADVICE}"
            )
        return f"step {step}: gradients that are not finite (loss {result.loss:g}), so its update is left out"

    def resumed(self, step: int, changes: Sequence[tuple[str, Any, Any]], notes: Sequence[str]) -> None:
        """Record what a run that goes on after `step` does otherwise than before."""
        if dist.get_rank() == 0:
            values = {key: {"before": old, "now": new} for key, old, new in changes}
            self._record({"step": step, "kind": RESUMED, "changes": values, "notes": list(notes)})

    def _record(self, event: dict[str, Any]) -> None:
        self._events = self._events or Lines(self._folder / EVENTS_FILE)
        self._events.write(json.dumps(event))

    def _spike(self, step: int, result: StepResult, keys: Keys) -> str | None:
        found = None
        if self._recipe.spike_deviations and len(self._losses) >= _FEWEST:
            middle = median(list(self._losses)[-_RECENT:])
            # From step to step, so that a loss that falls is no spread.
            moves = [abs(later - earlier) for earlier, later in itertools.pairwise(self._losses)]
            deviation = max(_DEVIATION * median(moves) / math.sqrt(2), 1e-3 * abs(middle))
            if result.loss > middle + self._recipe.spike_deviations * deviation:
                self._note("loss_spike", step, result, keys, median=middle, deviation=deviation)
                found = f"step {step}: loss {result.loss:.4f} stands out of {middle:.4f} ± {deviation:.4f}"
        self._losses.append(result.loss)
        return found

    def _note(self, kind: str, step: int, result: StepResult, keys: Keys, **more: float) -> None:
        if dist.get_rank() != 0:
            return
        event = {"step": step, "kind": kind, "loss": str(result.loss), "grad_norm": str(result.grad_norm), **more}
        self._record(event | keys())


def _losses_so_far(folder: Path, step: int) -> list[float]:
    """The last ones that the run recorded; events after `step`, which is taken again, are dropped."""
    truncate_after(folder / EVENTS_FILE, step)
    found = [r["train/loss"] for r in read_metrics(folder / METRICS_FILE) if r.get("train/loss") is not None]
    return found[-_WINDOW:]


_ADVICE = (
    f"RUN/{EVENTS_FILE} has its sequences, `bd3-scale replay RUN` computes it again; lower optimizer.lr or lengthen "
    "optimizer.warmup_steps, and run again to go on from the last checkpoint"
)
