"""Time training steps of bd3_scale and of rivals, which take turns in one process: see `bench_step.py`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from bd3_scale.data.batch import Batch
from bd3_scale.model.rows import ModelInputs
from bd3_scale.objective import NextToken, Objective, StepKeys, objective_of
from bd3_scale.observe.flops import peak_flops
from bd3_scale.parallel.engine import TrainingEngine, open_engine
from bd3_scale.parallel.groups import ProcessGroups, local_device, placement
from bd3_scale.recipe.schema import Recipe
from bd3_scale.recipe.vocabulary import Vocabulary
from tools.plain_step import PlainStep

MakeInputs = Callable[[int], list[ModelInputs]]


def synthetic(recipe: Recipe, vocabulary: Vocabulary, groups: ProcessGroups, step: int) -> list[Batch]:
    """Return this rank's micro-batches of random tokens, unpacked, in the form of the training stream."""
    batch, length = recipe.train.global_batch_size, recipe.data.seq_len
    share = batch // groups.dp.size()
    slots = torch.arange(groups.dp.rank() * share, (groups.dp.rank() + 1) * share)
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, vocabulary.mask_id, (batch, length), generator=generator)[slots]
    whole = Batch(
        ids=step * batch + slots,
        slots=slots,
        epochs=torch.zeros_like(slots),
        source_keys=torch.zeros_like(slots),
        tokens=tokens,
        document_start=torch.zeros(share, length, dtype=torch.int32),
        positions=torch.arange(length).expand(share, -1),
        counted=torch.ones(share, length, dtype=torch.bool),
        shown=torch.zeros(share, length, dtype=torch.bool),
    )
    return whole.split(recipe.train.micro_batch_size)


def makers(recipe: Recipe, vocabulary: Vocabulary, groups: ProcessGroups) -> dict[str, MakeInputs]:
    """Return, for each objective, a function that makes a step's micro-batches."""

    def maker(objective: Objective) -> MakeInputs:
        return lambda step: [
            objective.training_inputs(
                micro, StepKeys(step, recipe.seed, recipe.train.global_batch_size, {}), placement(groups)
            )
            for micro in synthetic(recipe, vocabulary, groups, step)
        ]

    return {
        "bd3": maker(objective_of(recipe.diffusion, vocabulary)),
        "mdlm": maker(objective_of(recipe.diffusion, vocabulary).at(recipe.data.seq_len)),
        "ar": maker(NextToken(recipe.diffusion, vocabulary)),
    }


class Phases:
    """Measures the seconds of each phase of a step; on a GPU every phase ends with a synchronisation."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def add(self, name: str, began: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - began

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        began = self.now()
        yield
        self.add(name, began)


@dataclass
class Contender:
    """An implementation to time: `step(number)` returns its seconds by phase, the total under `step` and `cpu`."""

    name: str
    step: Callable[[int], dict[str, float]]
    flops_needed: float = 0.0
    flops_ran: float = 0.0
    seen: list[dict[str, float]] = field(default_factory=list)

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(times[name] for times in self.seen) for name in self.seen[0]}


@dataclass(frozen=True)
class Case:
    """A recipe to measure, and the implementations of its steps."""

    recipe: Recipe
    contenders: list[Contender]


def open_case(
    recipe: Recipe,
    vocabulary: Vocabulary,
    groups: ProcessGroups,
    objectives: Sequence[str],
    dropouts: Sequence[float],
) -> Case:
    """Open every objective of bd3_scale, each followed by its plain PyTorch rival for each of `dropouts`."""
    make = makers(recipe, vocabulary, groups)
    contenders = []
    for objective in objectives:
        engine = open_engine(recipe, vocabulary, groups, device=local_device(), seed=1)
        contenders.append(first_step(objective, engine, make[objective], recipe))
        for dropout in dropouts:
            size, mask_id = vocabulary.size, vocabulary.mask_id
            rival = PlainStep(recipe, size, mask_id, objective=objective, dropout=dropout).to(local_device())
            name = f"plain {objective}" + f", dropout {dropout}" * (dropout > 0)
            contenders.append(Contender(name, partial(rival_step, rival, recipe, vocabulary, groups)))
    return Case(recipe, contenders)


def tokens_of(recipe: Recipe) -> int:
    return recipe.train.global_batch_size * recipe.data.seq_len


def first_step(objective: str, engine: TrainingEngine, make: MakeInputs, recipe: Recipe) -> Contender:
    """Return bd3_scale's implementation, after a step that counts its FLOPs."""
    with FlopCounterMode(display=False) as counter:
        needed = engine.step(make(0), tokens=tokens_of(recipe), lr=1e-4).flops
    step = partial(measured_step, engine, make, tokens_of(recipe))
    return Contender(objective, step, needed, float(counter.get_total_flops()))


def take_turns(cases: Sequence[Case], *, warmup: int, steps: int) -> None:
    """Take steps of all contenders in turns, so that other load of the machine affects all equally."""
    for step in range(1, warmup + steps):
        for case in cases:
            for contender in case.contenders:
                seconds = contender.step(step)
                if step >= warmup:
                    contender.seen.append(seconds)


def measured_step(engine: TrainingEngine, make: MakeInputs, tokens: int, step: int) -> dict[str, float]:
    """Take a step and return the seconds of its phases, with forward and backward separated."""
    phases = Phases(local_device())
    began: list[float] = []
    hooks = [
        handle
        for chunk in engine.chunks
        for handle in (
            chunk.register_forward_pre_hook(lambda *_: began.append(phases.now())),
            chunk.register_forward_hook(lambda *_: phases.add("forward", began.pop())),
        )
    ]
    cpu, start = time.process_time(), phases.now()
    with phases.measure("data"):
        inputs = make(step)
    with phases.measure("backward"):
        engine.gradients(inputs, tokens=tokens)
    with phases.measure("optimizer"):
        engine.update(1e-4)
    phases.add("step", start)
    phases.seconds["cpu"] = time.process_time() - cpu
    for hook in hooks:
        hook.remove()
    phases.seconds["backward"] -= phases.seconds["forward"]
    return phases.seconds


def rival_step(
    rival: PlainStep, recipe: Recipe, vocabulary: Vocabulary, groups: ProcessGroups, step: int
) -> dict[str, float]:
    """Take a step of the plain model on a batch of the same shape and mask rates; making it is not timed."""
    (batch,) = synthetic(recipe, vocabulary, groups, step)
    size = recipe.data.seq_len if rival.objective == "mdlm" else recipe.diffusion.block_size
    blocks = torch.rand(len(batch.ids), recipe.data.seq_len // size)
    rate = blocks.repeat_interleave(size, 1)
    masked = torch.rand(rate.shape) < rate
    phases = Phases(local_device())
    cpu = time.process_time()
    with phases.measure("step"):
        rival.step(*(x.to(local_device()) for x in (batch.tokens, masked, rate)))
    return phases.seconds | {"cpu": time.process_time() - cpu}


def rows_of(case: Case, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Return a row for each contender: medians, and for bd3_scale its FLOPs and utilisation (collective)."""
    peak, world, rows = peak_flops(dtype), dist.get_world_size(), []
    for contender in case.contenders:
        seconds = contender.medians()
        row = {"objective": contender.name, "cpu_seconds": seconds.pop("cpu"), "seconds": seconds}
        row["tokens_per_second"] = tokens_of(case.recipe) / seconds["step"]
        if contender.flops_needed:
            needed, ran = contender.flops_needed, _sum_over_model(contender.flops_ran)
            row |= {
                "flops_needed": needed,
                "flops_ran": ran,
                "flops_per_second": needed / seconds["step"] / world,
                "mfu": None if peak is None else needed / seconds["step"] / peak / world,
                "hfu": None if peak is None else ran / seconds["step"] / peak / world,
            }
        rows.append(row)
    return rows


def _sum_over_model(ran: float) -> float:
    total = torch.tensor(ran, dtype=torch.float64, device=local_device())
    dist.all_reduce(total)
    return float(total)
