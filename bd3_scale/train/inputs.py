"""Make the inputs of each step from the batches of the stream, while the device computes the step before."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bd3_scale.data.batch import Batch
from bd3_scale.data.mixture import source_key
from bd3_scale.diffusion.interval import Interval
from bd3_scale.model.rows import ModelInputs, Placement
from bd3_scale.objective import Objective, StepKeys
from bd3_scale.parallel.groups import ProcessGroups, local_device
from bd3_scale.recipe.schema import Recipe
from bd3_scale.resilience.heartbeat import Heartbeat
from bd3_scale.resilience.signals import StopRequest, StopRequestedError
from bd3_scale.train.state import TrainState


def step_inputs(
    objective: Objective, recipe: Recipe, batch: Batch, groups: ProcessGroups, *, keys: StepKeys
) -> list[ModelInputs]:
    """Return the micro-batches of this rank's part of a global batch, on the host."""
    place = Placement(torch.device("cpu"), (groups.cp.rank(), groups.cp.size()))
    micro_batches = batch.split(recipe.train.micro_batch_size)
    made = [objective.training_inputs(micro, keys, place) for micro in micro_batches]
    if len(names := list(recipe.data.by_source)) > 1:
        source_keys = torch.tensor([source_key(name) for name in names])
        made = [_by_source(inputs, micro, source_keys) for inputs, micro in zip(made, micro_batches, strict=True)]
    return made


def _by_source(inputs: ModelInputs, batch: Batch, source_keys: Tensor) -> ModelInputs:
    """Return the inputs with their loss groups divided by source: group = block size index · sources + source."""
    sources = (batch.source_keys[:, None] == source_keys).int().argmax(1)
    loss_groups = torch.tensor(inputs.loss_groups or [0] * len(sources)) * len(source_keys) + sources
    row_groups = loss_groups[inputs.head_rows % len(loss_groups)]
    return replace(inputs, loss_groups=tuple(loss_groups.tolist()), row_loss_groups=row_groups)


def with_heartbeat(batches: Iterator[Batch], heartbeat: Heartbeat, stop: StopRequest | None = None) -> Iterator[Batch]:
    """Yield `batches`; during a wait the heartbeat is in the phase `data`, and a signal to `stop` ends the wait with
    StopRequestedError, since it may last as long as a remote store is unreachable.
    """
    while True:
        with heartbeat.during("data"), nullcontext() if stop is None else stop.interrupts_wait():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


class InputsAhead:
    """The inputs of the steps on this rank's device, in order; those of the next step can be made ahead.

    No thread makes them. On a GPU the host is idle once it has launched the kernels of a step; on a CPU a thread would
    compete with the step for the cores.
    """

    def __init__(
        self, objective: Objective, recipe: Recipe, batches: Iterator[Batch], groups: ProcessGroups, state: TrainState
    ) -> None:
        self._objective, self._recipe, self._groups, self._state = objective, recipe, groups, state
        self._batches = batches
        self._next = state.step + 1
        self._ahead: _Made | Exception | None = None
        # Seconds of the wait for the batch of the last step.
        self.waited = 0.0
        # True if a signal has ended the wait for the next batch: then there is no next step.
        self.given_up = False

    def make_ahead(self) -> None:
        """Make the inputs of the step after the last one taken, unless the run has no more steps.

        An error is raised by `take`, not here: the current step has all that it needs, and may be due for a checkpoint.
        """
        assert self._ahead is None, "take the inputs that were made ahead first"
        if self._next > self._recipe.train.steps:
            return
        try:
            self._ahead = self._next_made()
        except StopRequestedError:
            self.given_up = True
        except Exception as error:  # noqa: BLE001 - raised again by `take`
            self._ahead = error

    def take(self) -> list[ModelInputs]:
        """Return the inputs of the next step. Raises as its batch and the objective do."""
        ahead, self._ahead = self._ahead, None
        if isinstance(ahead, Exception):
            raise ahead
        made = self._next_made() if ahead is None else ahead
        if made.intervals != self._state.intervals:
            # An evaluation between the steps has changed the intervals.
            made = self._made(made.batch, made.waited)
        self._next += 1
        self.waited = made.waited
        return made.inputs

    def _next_made(self) -> _Made:
        began = time.monotonic()
        batch = next(self._batches)
        return self._made(batch, time.monotonic() - began)

    def _made(self, batch: Batch, waited: float) -> _Made:
        recipe, intervals = self._recipe, dict(self._state.intervals)
        keys = StepKeys(self._next - 1, recipe.seed, recipe.train.global_batch_size, intervals)
        on_host = step_inputs(self._objective, recipe, batch, self._groups, keys=keys)
        return _Made(batch, waited, intervals, [inputs.to(local_device()) for inputs in on_host])


@dataclass(frozen=True)
class _Made:
    batch: Batch
    waited: float
    intervals: Mapping[int, Interval]
    inputs: list[ModelInputs]
