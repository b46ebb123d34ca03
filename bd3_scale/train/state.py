"""Hold the progress of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bd3_scale.data.order import DataOrder
from bd3_scale.diffusion.interval import Interval
from bd3_scale.parallel.engine import StepResult
from bd3_scale.train.resume import Start


@dataclass
class TrainState:
    """State that the loop changes, the same on every rank; checkpoints keep it beside the weights and the optimiser.

    step: finished optimiser steps. skipped: those whose update was skipped, since their
    gradients were not finite. intervals: of mask rates, by block size, after an evaluation has searched for them.
    tiles: of the attention kernels. Other tiles add in another order, and a resumed run must be bitwise the run that
    was not interrupted. order: of the data; None until it is resolved.
    """

    step: int = 0
    skipped: int = 0
    intervals: Mapping[int, Interval] = field(default_factory=dict)
    tiles: Mapping[str, Sequence[int]] = field(default_factory=dict)
    order: DataOrder | None = None

    @classmethod
    def at(cls, start: Start | None) -> TrainState:
        """Return the state of the checkpoint that a run resumes from; a new run is at step 0, whatever its weights."""
        if start is None or not start.resumes:
            return cls()
        kept = start.manifest
        return cls(kept.step, kept.skipped, dict(kept.intervals), dict(kept.attention_tiles), kept.data_order)

    def finish_step(self, result: StepResult) -> None:
        """Count a step."""
        self.step += 1
        self.skipped += not result.applied
