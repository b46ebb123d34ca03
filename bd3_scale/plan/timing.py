"""Compute the seconds of a step from its traces and from what the hardware is expected to reach.

The model is a roofline (Williams et al., 2009). A kernel takes the longer of two times: that of its floating-point
operations, and that of its memory traffic. The host must launch each kernel. A collective takes the time of its bytes
over the slowest link of its group, less the time of the computation that it overlaps with. All numbers are predictions.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bd3_scale.plan.hardware import Hardware
from bd3_scale.plan.trace import IN_FP32, Key, Message, Trace, Work, links_of
from bd3_scale.recipe.schema import Recipe

# The deterministic backward has seven matrix products, the fused one five; see `attention.kernels.backward`.
DETERMINISTIC_BACKWARD = 1.4
_LAYOUT = ("cat", "clone", "copy", "slice", "constant_pad", "index", "embedding", "stack")
# For each collective of n ranks, the bytes that a rank sends, as a multiple of those of the largest tensor. These are
# the counts of ring algorithms, which send the least.
_SENT = {
    "allreduce_": lambda n: 2 * (n - 1) / n,
    "_allgather_base_": lambda n: (n - 1) / n,
    "allgather_": lambda n: n - 1,
    "_reduce_scatter_base_": lambda n: (n - 1) / n,
    "reduce_scatter_": lambda n: n - 1,
    # In a pipelined ring each rank passes on the whole tensor, all ranks at the same time.
    "reduce_": lambda n: 1.0,
    "broadcast_": lambda n: 1.0,
}


@dataclass(frozen=True)
class StepTime:
    """The time of a step, and how it is spent.

    Attributes:
        seconds: the time of the step.
        needed: the time of the floating-point operations that the model needs, at the peak.
        losses: the difference of the two, in seconds by reason.
        messages: the time of messages by group, including what computation hides.
        host_seconds: the time that the host takes to launch a step.
    """

    seconds: float
    needed: float
    losses: dict[str, float]
    messages: dict[str, float]
    host_seconds: float

    @property
    def mfu(self) -> float:
        return self.needed / self.seconds


def step_time(recipe: Recipe, stages: Mapping[int, Trace], world_size: int, hardware: Hardware) -> StepTime:
    """Return the time of a step of a pipeline with the traced stages; the slowest stage determines it."""
    parallel = recipe.parallel
    of_stage = {stage: Rank(trace, recipe, hardware) for stage, trace in stages.items()}
    slowest = max(of_stage.values(), key=lambda rank: rank.inside)
    trace = slowest.trace
    # The bubble of 1F1B, and of interleaved stages (Narayanan et al., SC 2021, section 2.2): (p − 1) / (v · m) of the
    # time of the micro-batches.
    idle = (parallel.pipeline - 1) / parallel.virtual_pipeline / trace.micro_batches
    bubble = slowest.inside * idle
    outside = max(of_stage.values(), key=lambda rank: rank.outside)
    seconds = slowest.inside + bubble + outside.outside
    replicas = world_size // parallel.model_size
    needed = trace.flops * replicas * parallel.context / world_size / hardware.peak
    losses = defaultdict(float, slowest.losses_inside)
    for why, value in outside.losses_outside.items():
        losses[why] += value
    losses["pipeline bubble"] = bubble
    other = seconds - needed - sum(losses.values())
    losses["stages of unequal work" if parallel.pipeline > 1 else "products that nothing reads"] = other
    return StepTime(
        seconds,
        needed,
        {why: value for why, value in sorted(losses.items(), key=lambda item: -item[1]) if value > 1e-9},
        dict(slowest.messages),
        slowest.host,
    )


class Rank:
    """The seconds of one rank: inside the pipeline, and outside, where gradients are reduced and weights updated."""

    def __init__(self, trace: Trace, recipe: Recipe, hardware: Hardware) -> None:
        self.trace, self._hardware = trace, hardware
        self._backward = DETERMINISTIC_BACKWARD if recipe.deterministic else 1.0
        self._overlaps = recipe.parallel.virtual_pipeline > 1
        self.losses_inside: defaultdict[str, float] = defaultdict(float)
        self.losses_outside: defaultdict[str, float] = defaultdict(float)
        self.messages: defaultdict[str, float] = defaultdict(float)
        self._needed = self._host_inside = self._host_outside = self._overlapping = 0.0
        for key, work in trace.work.items():
            self._count(key, work)
        self._send_all()
        busy = self._needed + sum(self.losses_inside.values())
        exposed = max(0.0, self._overlapping - busy)
        self.losses_inside["pipeline-parallel messages"] += exposed
        self.losses_inside[_LAUNCHES] = max(0.0, self._host_inside - busy - exposed)
        self.losses_outside[_LAUNCHES] = max(0.0, self._host_outside - sum(self.losses_outside.values()))
        self.inside = self._needed + sum(self.losses_inside.values())
        self.outside = sum(self.losses_outside.values())

    @property
    def host(self) -> float:
        return self._host_inside + self._host_outside

    def _count(self, key: Key, work: Work) -> None:
        inside = key.phase == "gradients" and bool(key.part)
        host = work.calls * self._hardware.launch_seconds
        seconds = self.kernel_seconds(key, work)
        if not inside:
            self._host_outside += host
            self.losses_outside["update of the weights" if key.phase == "update" else _REDUCTION] += seconds
            return
        self._host_inside += host
        useful = work.flops / self._hardware.peak if key.direction != "recomputed" else 0.0
        self._needed += useful
        self.losses_inside[reason(key)] += seconds - useful

    def kernel_seconds(self, key: Key, work: Work) -> float:
        """Return the seconds of all kernels of an entry on the device."""
        hardware = self._hardware
        memory = work.bytes / (hardware.stream * hardware.memory_bandwidth)
        if key.is_product:
            peak = hardware.fp32_flops if key.name.endswith(IN_FP32) else hardware.peak
            # By absolute value: in a sum of traces with weights an entry may be negative.
            return max(work.flops / (hardware.matmul * peak), memory, key=abs)
        if key.name == "block_attention":
            return work.flops / hardware.attention[0]
        if key.name == "block_attention_backward":
            return self._backward * work.flops / hardware.attention[1]
        return memory

    def _send_all(self) -> None:
        hidden = self._hidden()
        for key, message in self.trace.messages.items():
            seconds = message_seconds(key, message, self._hardware)
            if not seconds:
                continue
            between = key.direction == "pipeline" and not key.part and key.phase == "gradients"
            self.messages[key.direction] += seconds
            if between and self._overlaps:
                self._overlapping += seconds
                continue
            inside = between or (key.phase == "gradients" and bool(key.part))
            losses = self.losses_inside if inside else self.losses_outside
            losses[f"{key.direction}-parallel messages"] += seconds - hidden.get(key, 0.0)

    def _hidden(self) -> dict[Key, float]:
        """Return the seconds of each entry's messages that computation hides.

        A message is hidden by what is computed until somebody waits for it. Messages of a group are sent one after the
        other, so all of them together hide no more than what is computed while any of them is pending.
        """
        hidden: dict[Key, float] = {}
        covered: dict[str, float] = defaultdict(float)
        for key, message in self.trace.messages.items():
            overlapped = self.kernel_seconds(_MIXED, message.overlapped)
            hidden[key] = min(message_seconds(key, message, self._hardware), overlapped, key=abs)
            covered[links_of(key.direction)] += self.kernel_seconds(_MIXED, message.exclusive)
        for links, most in covered.items():
            whole = sum(seconds for key, seconds in hidden.items() if links_of(key.direction) == links)
            share = max(0.0, min(1.0, most / whole)) if whole > 0 else 1.0
            hidden |= {key: share * seconds for key, seconds in hidden.items() if links_of(key.direction) == links}
        return hidden


_MIXED = Key("", "", "", "mm", "")
_REDUCTION = "gradients between micro-batches and reduction"
_LAUNCHES = "launches that the GPU waits for"
_ROUTER = "router in fp32"
_SORTED = "rows sorted for their experts, and back"


def message_seconds(key: Key, message: Message, hardware: Hardware) -> float:
    """Return the seconds of all messages of an entry on the links of their group."""
    if len(message.ranks) < 2:
        return 0.0
    of_node = Counter(rank // hardware.gpus_per_node for rank in message.ranks)
    stays, in_node = len(of_node) == 1, min(of_node.values())
    latency = message.calls * hardware.latency_seconds[0 if stays else 1]
    if key.name == "alltoall_base_":
        return _all_to_all(message.bytes, len(message.ranks), in_node, hardware) + latency
    # A group that spans nodes uses one network card for each of its ranks in a node.
    link = hardware.node_bandwidth if stays else min(hardware.node_bandwidth, in_node * hardware.network_bandwidth)
    sent = message.bytes * _SENT.get(key.name, lambda _: 1.0)(len(message.ranks))
    return sent / (hardware.collective * link) + latency


def _all_to_all(size: float, ranks: int, in_node: int, hardware: Hardware) -> float:
    """Return the seconds of an all-to-all of `size` bytes a rank, an equal share for each rank.

    A rank sends over its links inside the node and over its network card at the same time.
    """
    inside = (in_node - 1) / ranks * size / hardware.node_bandwidth
    across = (ranks - in_node) / ranks * size / hardware.network_bandwidth
    return max(inside, across) / hardware.collective


def reason(key: Key) -> str:
    """Return why a kernel inside the model takes longer than at the peak, for people."""
    if key.direction == "recomputed":
        return "activations computed again"
    if key.part == "router":
        return _ROUTER
    if key.is_product:
        return "matrix products below the peak"
    if key.name.startswith("block_attention"):
        return "attention kernel below the peak"
    if key.part == "mixture":
        return _SORTED
    if key.part == "gradients" or (key.part == "experts" and key.name == "add_"):
        return "gradients added up in fp32"
    if key.part == "head":
        return "head: cross-entropy"
    if key.part == "norm" or "norm" in key.name:
        return "norms"
    if key.name == "_to_copy":
        return "gradients added up in fp32"
    if key.name.startswith(_LAYOUT):
        return "copies and layouts"
    return "activations, rotation and residuals"


# For each loss, what reduces it.
REMEDIES: dict[str, str] = {
    "matrix products below the peak": "a larger micro-batch, or fewer tensor-parallel ranks: larger products",
    "attention kernel below the peak": "tune its tiles; deterministic: false spares two of seven products in backward",
    "activations computed again": "train.recompute: selective or none, where memory allows",
    "gradients added up in fp32": "a larger micro-batch: fewer times to add up",
    "head: cross-entropy": "nothing in a recipe",
    "norms": "nothing in a recipe",
    "copies and layouts": "nothing in a recipe",
    "activations, rotation and residuals": "nothing in a recipe",
    _ROUTER: "nothing in a recipe",
    _SORTED: "nothing in a recipe",
    "expert-parallel messages": "fewer expert-parallel ranks, those of a node at the most, where memory allows",
    "expert-data-parallel messages": "a larger global batch: fewer bytes a step",
    "tensor-parallel messages": "fewer tensor-parallel ranks, where memory allows",
    "context-parallel messages": "fewer context-parallel ranks, where memory allows",
    "pipeline-parallel messages": "parallel.virtual_pipeline above 1: they overlap with computation",
    "data-parallel messages": "a larger global batch, or more model-parallel ranks: fewer bytes a step",
    "model-parallel messages": "nothing in a recipe",
    "pipeline bubble": "parallel.virtual_pipeline, or more micro-batches: a smaller micro-batch, a larger global batch",
    "update of the weights": "a larger global batch: fewer updates",
    _REDUCTION: "a larger global batch",
    _LAUNCHES: "a larger micro-batch: more work a kernel",
    "stages of unequal work": "parallel.layers_per_chunk: fewer layers on the stage of the head",
    "products that nothing reads": "nothing in a recipe",
}


def largest(losses: Mapping[str, float], count: int = 5) -> Sequence[tuple[str, float, str]]:
    """Return the largest losses, each with what would reduce it."""
    ordered = sorted(losses.items(), key=lambda item: -item[1])[:count]
    return [(name, seconds, REMEDIES[name]) for name, seconds in ordered]
