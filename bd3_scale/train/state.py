"""How far a training has come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bd3_scale.data.order import DataOrder
from bd3_scale.diffusion.interval import Interval
from bd3_scale.parallel.engine import StepResult
from bd3_scale.train.resume import Start


@dataclass
class TrainState:
    """What the loop changes as it goes, on every rank alike, and checkpoints keep beside weights and optimiser.

    step: finished optimiser steps. skipped: those of them whose gradients were not finite, so that their update was
    left out. intervals: of mask rates, by block size, where an evaluation has searched one. tiles: of the attention
    kernels: other ones add in another order, and a resumed run is bitwise the run that was not interrupted. order: of
    the data; None until it is settled.
    """

    step: int = 0
    skipped: int = 0
    intervals: Mapping[int, Interval] = field(default_factory=dict)
    tiles: Mapping[str, Sequence[int]] = field(default_factory=dict)
    order: DataOrder | None = None

    @classmethod
    def at(cls, start: Start | None) -> TrainState:
        """Return that of the checkpoint a run goes on from; a new one, also with the weights of another, is at 0."""
        if start is None or not start.resumes:
            return cls()
        kept = start.manifest
        return cls(kept.step, kept.skipped, dict(kept.intervals), dict(kept.attention_tiles), kept.data_order)

    def finish_step(self, result: StepResult) -> None:
        """Count a step."""
        self.step += 1
        self.skipped += not result.applied
