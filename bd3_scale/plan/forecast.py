"""Predict what a run needs and takes: trace its ranks on fake devices, and compute times from data of the hardware."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from bd3_scale.data.cache import NodeCache, ShardSizes, default_window
from bd3_scale.plan import timing
from bd3_scale.plan.hardware import Hardware
from bd3_scale.plan.job import Job
from bd3_scale.plan.samples import samples
from bd3_scale.plan.trace import Segment, Trace, combine
from bd3_scale.plan.trace_cache import traces_of
from bd3_scale.recipe.checks import check_recipe
from bd3_scale.recipe.schema import Recipe
from bd3_scale.recipe.vocabulary import Vocabulary

# Memory is reserved for this many more rows than the mean, which the experts of a rank may get. A rank has many
# experts, whose loads partly even out; but masked rows of the first layers are alike and choose the same experts.
UNEVEN = 0.25


@dataclass(frozen=True)
class StageMemory:
    """Memory of a rank of one pipeline stage, in bytes.

    Attributes:
        peak_bytes: peak of its tensors.
        where: the segment of the step with the peak.
        memory: the peak by category.
        uneven_bytes: for rows that the rank's experts may get beyond the mean, see `UNEVEN`.
        card_bytes: both together, with CUDA's context, NCCL's buffers and fragmentation.
        margin_bytes: what is left on the card; negative if it does not fit.
    """

    stage: int
    peak_bytes: int
    where: str
    memory: dict[str, int]
    uneven_bytes: int
    card_bytes: int
    margin_bytes: int


@dataclass(frozen=True)
class Forecast:
    """The prediction of a run; nothing in it was measured.

    Attributes:
        time: the time of a step; see `timing.StepTime`.
        parts: floating-point operations, bytes of memory traffic, launches and seconds of a step by part of the model,
            for one rank of the slowest stage.
        messages: bytes, calls and seconds of a step by group of ranks, for that rank.
        waits: how often the host waits for the device in a step, by function and line of code.
        run: steps, seconds, GPU hours and cost until the last step, with evaluations and saves.
        checkpoint: its bytes, of all ranks and of one, the seconds that training waits, and those to write it.
    """

    recipe: Recipe
    vocabulary: Vocabulary
    gpus: int
    hardware: Hardware
    parameters: int
    ranks: list[StageMemory]
    time: timing.StepTime
    parts: dict[str, dict[str, float]]
    messages: dict[str, dict[str, float]]
    waits: dict[str, float]

    @property
    def notes(self) -> list[str]:
        """Return what a person should change or know."""
        notes = [self.cache_problem] if self.cache_problem else []
        if self.recipe.parallel.offload_optimizer:
            notes.append("the time does not include the optimiser's arithmetic on the hosts' CPUs, nor its copies")
        if schedule := self.recipe.diffusion.block_size_schedule:
            steps = sum(phase.steps for phase in schedule)
            notes.append(f"all steps are predicted as those after the {steps:,} of diffusion.block_size_schedule")
        if self.recipe.parallel.expert > 1:
            notes.append(
                "the time assumes equal loads of all ranks' experts, but a step waits for the largest load; memory is "
                f"reserved for {UNEVEN:.0%} more rows than the mean"
            )
        return notes

    @property
    def node_cache(self) -> NodeCache | None:
        """Return the cache that a machine needs for the remote sources of data; None without remote sources."""
        data, batch, parallel = self.recipe.data, self.recipe.train.global_batch_size, self.recipe.parallel
        if not data.remotes or not data.shuffle:
            return None
        sizes = ShardSizes.expected(data.seq_len, self.vocabulary.size)
        ranks_per_replica, stage = parallel.tensor * parallel.context, self.gpus // parallel.pipeline
        # Only the ranks of the first stage read data.
        ranks = range(stage)
        machines = (
            ranks[first : first + self.hardware.gpus_per_node] for first in ranks[:: self.hardware.gpus_per_node]
        )
        dp_ranks = ([rank // ranks_per_replica for rank in machine] for machine in machines)
        return NodeCache.of_fullest(sizes, batch, dp_ranks, stage // ranks_per_replica)

    @property
    def shuffle_window(self) -> int:
        """Return the shuffle window of the recipe, or the one that a run would choose."""
        data, batch = self.recipe.data, self.recipe.train.global_batch_size
        sizes = ShardSizes.expected(data.seq_len, self.vocabulary.size)
        return data.shuffle_window or default_window(sizes, data.cache_limit, batch)

    @property
    def cache_problem(self) -> str:
        """Return why a run would be refused because of its cache; an empty string if it would not."""
        limit = self.recipe.data.cache_limit
        if (cache := self.node_cache) is None or limit is None:
            return ""
        try:
            cache.check(limit, self.shuffle_window, may_change=True)
        except ValueError as error:
            return str(error)
        return ""

    @property
    def fits(self) -> bool:
        return all(rank.margin_bytes >= 0 for rank in self.ranks)

    @property
    def tokens_per_step(self) -> int:
        return self.recipe.train.global_batch_size * self.recipe.data.seq_len

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.time.seconds

    @property
    def checkpoint(self) -> dict[str, float]:
        parallel = self.recipe.parallel
        whole = checkpoint_bytes(self.recipe, self.parameters)
        writers = self.gpus if parallel.zero_stage else parallel.model_size // parallel.context
        return {
            "bytes": whole,
            "bytes_of_a_rank": whole / writers,
            "blocked_seconds": whole / writers / self.hardware.host_bandwidth,
            "seconds": whole / self.hardware.storage_bandwidth,
        }

    @property
    def run(self) -> dict[str, float]:
        train, evaluation = self.recipe.train, self.recipe.evaluation
        # There is always an evaluation, and a save, after the last step.
        evaluations = -(-train.steps // evaluation.every_steps) if evaluation.every_steps else 1
        # A forward is about a third of a step's work: backward is twice the forward.
        an_evaluation = self.time.seconds / 3 * evaluation.sequences * evaluation.draws / train.global_batch_size
        every = self.recipe.checkpoint.every_steps
        saves = -(-train.steps // every) if every else 1
        steps = train.steps * self.time.seconds
        seconds = steps + evaluations * an_evaluation + saves * self.checkpoint["blocked_seconds"]
        hours = seconds / 3600 * self.gpus
        return {
            "steps": train.steps,
            "tokens": train.steps * self.tokens_per_step,
            "seconds": seconds,
            "gpu_hours": hours,
            "cost": hours * self.hardware.price,
        }

    def as_json(self) -> dict[str, Any]:
        """Return the prediction as values of JSON, in seconds, bytes and dollars."""
        return {
            "predicted": True,
            "recipe": self.recipe.name,
            "gpus": self.gpus,
            "layout": layout(self.recipe, self.gpus),
            "parameters": self.parameters,
            "fits": self.fits,
            "ranks": [asdict(rank) for rank in self.ranks],
            "step_seconds": self.time.seconds,
            "mfu": self.time.mfu,
            "tokens_per_second": self.tokens_per_second,
            "losses": self.time.losses,
            "host_seconds": self.time.host_seconds,
            "parts": self.parts,
            "messages": self.messages,
            "waits": self.waits,
            "run": self.run,
            "checkpoint": self.checkpoint,
            "node_cache_bytes": self.node_cache and self.node_cache.needed(self.shuffle_window),
            "shuffle_window": self.shuffle_window,
            "notes": self.notes,
            "assumptions": self.hardware.model_dump(mode="json"),
        }


def layout(recipe: Recipe, gpus: int) -> str:
    """Return a description of the layout, for people."""
    parallel, train = recipe.parallel, recipe.train
    parts = [f"tensor {parallel.tensor}{' with sequence' * parallel.sequence}"] if parallel.tensor > 1 else []
    chunks = f" x {parallel.virtual_pipeline}" if parallel.virtual_pipeline > 1 else ""
    parts += [f"pipeline {parallel.pipeline}{chunks}"] if parallel.pipeline > 1 else []
    parts += [f"context {parallel.context}"] if parallel.context > 1 else []
    parts += [f"expert {parallel.expert}"] if parallel.expert > 1 else []
    parts += [f"data {gpus // parallel.model_size}", f"ZeRO {parallel.zero_stage}"]
    parts += [f"micro-batch {train.micro_batch_size}"]
    parts += [f"{train.recompute} recomputation"] if train.recompute != "none" else []
    return ", ".join(parts)


def forecast(
    recipe: Recipe,
    vocabulary: Vocabulary,
    gpus: int,
    hardware: Hardware,
    *,
    device: str = "cuda",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Forecast:
    """Predict what a run of `recipe` on `gpus` needs and takes.

    device: the type of the fake devices; progress: is called with the number of traced ranks and of all ranks to trace.
    ValueError: the recipe contradicts itself, or does not fit the number of GPUs.
    """
    recipe = with_gpu_precision(recipe)
    traces = trace_stages(recipe, vocabulary, gpus, hardware, device=device, progress=progress)
    return assemble(recipe, vocabulary, gpus, hardware, traces)


def trace_stages(
    recipe: Recipe,
    vocabulary: Vocabulary,
    gpus: int,
    hardware: Hardware,
    *,
    device: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[int, Trace]:
    """Return the trace of a rank of each stage that differs; arguments and errors are those of `forecast`."""
    check_recipe(recipe, gpus)
    stages = traced_stages(recipe)
    last_phase = _after_schedule(recipe)
    jobs = {stage: samples(_job(last_phase, vocabulary, gpus, stage), stage) for stage in stages}
    flat = [sample.job for stage in stages for sample in jobs[stage]]
    count = 0

    def done() -> None:
        nonlocal count
        count += 1
        progress(count, len(flat))

    progress(0, len(flat))
    traced = iter(traces_of(flat, hardware, device=device, done=done))
    return {
        stage: combine([(sample.weight, sample.memory_weight, next(traced)) for sample in jobs[stage]])
        for stage in stages
    }


def with_gpu_precision(recipe: Recipe) -> Recipe:
    """Return the recipe with the precision `auto` resolved as on a GPU."""
    if recipe.train.precision != "auto":
        return recipe
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": "bf16"})})


def _after_schedule(recipe: Recipe) -> Recipe:
    """Return the recipe with the block sizes of its last phase, which has most of the steps, for all steps."""
    return recipe.model_copy(update={"diffusion": recipe.diffusion.model_copy(update={"block_size_schedule": ()})})


def traced_stages(recipe: Recipe) -> list[int]:
    """Return the pipeline stages to trace: the first, the last, and the one between them with the most layers."""
    stages = recipe.parallel.pipeline
    chunks = recipe.parallel.chunks(recipe.model.num_layers)
    dense = recipe.model.dense_layers
    with_experts = [min(layers, max(0, sum(chunks[: chunk + 1]) - dense)) for chunk, layers in enumerate(chunks)]
    held = [(sum(chunks[stage::stages]), sum(with_experts[stage::stages])) for stage in range(stages)]
    between = max(range(1, stages - 1), key=lambda stage: (*held[stage], -stage), default=0)
    return sorted({0, between, stages - 1})


def _job(recipe: Recipe, vocabulary: Vocabulary, gpus: int, stage: int) -> Job:
    replicas = gpus // recipe.parallel.model_size
    micro_batches = recipe.train.global_batch_size // (replicas * recipe.train.micro_batch_size)
    rank = stage * (gpus // recipe.parallel.pipeline)
    return Job(recipe, vocabulary, rank, gpus, micro_batches, beyond=True)


def assemble(
    recipe: Recipe, vocabulary: Vocabulary, gpus: int, hardware: Hardware, traces: dict[int, Trace]
) -> Forecast:
    """Compute the prediction of a run from its traced stages."""
    time = timing.step_time(recipe, traces, gpus, hardware)
    trace = traces[max(traces, key=lambda stage: timing.Rank(traces[stage], recipe, hardware).inside)]
    return Forecast(
        recipe,
        vocabulary,
        gpus,
        hardware,
        round(trace.parameters),
        [_memory(stage, trace, recipe, hardware) for stage, trace in traces.items()],
        time,
        _parts(trace, recipe, hardware),
        _messages(trace, hardware),
        {what: round(count, 1) for what, count in trace.waits.items() if count > 1e-6},
    )


def _memory(stage: int, trace: Trace, recipe: Recipe, hardware: Hardware) -> StageMemory:
    def uneven(segment: Segment) -> float:
        return UNEVEN * segment.memory.get("routed", 0.0) * (recipe.parallel.expert > 1)

    peak = max(trace.segments, key=lambda segment: segment.bytes + uneven(segment))
    card = (peak.bytes + uneven(peak)) * (1 + hardware.fragmentation) + hardware.overhead_gb * 1e9
    memory = {name: round(size) for name, size in sorted(peak.memory.items(), key=lambda item: -item[1]) if size >= 1}
    margin = math.floor(hardware.memory_bytes - card)
    return StageMemory(stage, round(peak.bytes), peak.name, memory, round(uneven(peak)), math.ceil(card), margin)


def _parts(trace: Trace, recipe: Recipe, hardware: Hardware) -> dict[str, dict[str, float]]:
    rank = timing.Rank(trace, recipe, hardware)
    parts: dict[str, dict[str, float]] = defaultdict(
        lambda: {"flops": 0.0, "bytes": 0.0, "launches": 0.0, "seconds": 0}
    )
    for key, work in trace.work.items():
        part = parts[key.part if key.phase == "gradients" and key.part else "update and reduction"]
        part["flops"] += work.flops
        part["bytes"] += work.bytes
        part["launches"] += work.calls
        part["seconds"] += rank.kernel_seconds(key, work)
    return dict(sorted(parts.items(), key=lambda item: -item[1]["seconds"]))


def _messages(trace: Trace, hardware: Hardware) -> dict[str, dict[str, float]]:
    groups: dict[str, dict[str, float]] = defaultdict(lambda: {"bytes": 0.0, "calls": 0.0, "seconds": 0.0})
    for key, message in trace.messages.items():
        if len(message.ranks) > 1:
            group = groups[key.direction]
            group["bytes"] += message.bytes
            group["calls"] += message.calls
            group["seconds"] += timing.message_seconds(key, message, hardware)
    for group in groups.values():
        # A layer's gradients are cut into messages where ranks' shards end. Small models are cut elsewhere, and their
        # weighted sum may be negative.
        group["calls"] = max(0.0, group["calls"])
    return dict(groups)


def checkpoint_bytes(recipe: Recipe, parameters: int) -> int:
    """Return the bytes of a checkpoint: fp32 master weights, the optimiser's states and the moving average."""
    return 4 * parameters * (len(_family_states(recipe)) + 1 + bool(recipe.optimizer.ema_decay))


def _family_states(recipe: Recipe) -> tuple[str, ...]:
    from bd3_scale.parallel import optimizer  # noqa: F401  (its families are registered)
    from bd3_scale.registry import optimizers

    return tuple(optimizers.get(recipe.optimizer.family).states)
