"""Check each step: count gradients that are not finite, and report losses far above the last ones."""

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
# Losses that are kept, the fewest that a comparison needs, and those whose median it is made with.
_WINDOW = 128
_FEWEST = 32
_RECENT = 16
# A spike is measured against the median absolute deviation, which one outlier does not move. For a normal
# distribution, so many of them are a standard deviation (Rousseeuw & Croux, JASA 1993).
_DEVIATION = 1.4826


class Guard:
    """The check of every step, with a record of the unusual ones in `events.jsonl`; step: finished steps."""

    def __init__(self, folder: Path, recipe: GuardRecipe, *, step: int) -> None:
        self._folder, self._recipe = folder, recipe
        self._in_a_row = 0
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._events: Lines | None = None
        self._losses.extend(on_rank_zero(lambda: _losses_so_far(folder, step)))

    def check(self, step: int, result: StepResult, keys: Keys) -> str | None:
        """Return a warning about a step, or None; keys: from what its sequences and noise are drawn.

        FloatingPointError, on all ranks: too many steps in a row were skipped, or the loss is not finite although the
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
        """Record which options of a run change when it resumes after `step`."""
        if dist.get_rank() == 0:
            values = {key: {"before": old, "now": new} for key, old, new in changes}
            self._record({"step": step, "kind": RESUMED, "changes": values, "notes": list(notes)})

    def _record(self, event: dict[str, Any]) -> None:
        self._events = self._events or Lines(self._folder / EVENTS_FILE)
        self._events.write(json.dumps(event))

    def _spike(self, step: int, result: StepResult, keys: Keys) -> str | None:
        warning = None
        if self._recipe.spike_deviations and len(self._losses) >= _FEWEST:
            middle = median(list(self._losses)[-_RECENT:])
            # Differences from step to step: a loss that falls steadily is no spread.
            moves = [abs(later - earlier) for earlier, later in itertools.pairwise(self._losses)]
            deviation = max(_DEVIATION * median(moves) / math.sqrt(2), 1e-3 * abs(middle))
            if result.loss > middle + self._recipe.spike_deviations * deviation:
                self._note("loss_spike", step, result, keys, median=middle, deviation=deviation)
                warning = f"step {step}: loss {result.loss:.4f} stands out of {middle:.4f} ± {deviation:.4f}"
        self._losses.append(result.loss)
        return warning

    def _note(self, kind: str, step: int, result: StepResult, keys: Keys, **more: float) -> None:
        if dist.get_rank() != 0:
            return
        event = {"step": step, "kind": kind, "loss": str(result.loss), "grad_norm": str(result.grad_norm), **more}
        self._record(event | keys())


def _losses_so_far(folder: Path, step: int) -> list[float]:
    """Return the last losses on record; drop the events after `step`, for those steps are taken again."""
    truncate_after(folder / EVENTS_FILE, step)
    losses = [r["train/loss"] for r in read_metrics(folder / METRICS_FILE) if r.get("train/loss") is not None]
    return losses[-_WINDOW:]


_ADVICE = (
    f"RUN/{EVENTS_FILE} has its sequences, `bd3-scale replay RUN` computes it again; lower optimizer.lr or lengthen "
    "optimizer.warmup_steps, and run again to go on from the last checkpoint"
)
