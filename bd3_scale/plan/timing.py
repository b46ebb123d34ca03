"""Seconds of a step, from what its ranks do and what their hardware is expected to reach: a roofline of each kernel,
and of messages what no computation covers.

All is predicted. A kernel takes as long as its floating-point operations or its memory traffic, whichever is longer;
the host must launch it; a collective takes its bytes over the slowest link of its group; what runs beside it hides it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bd3_scale.plan.hardware import Hardware
from bd3_scale.plan.trace import IN_FP32, Key, Message, Trace, Work, links_of
from bd3_scale.recipe.schema import Recipe

# Seven products where the fused backward has five; see `attention.kernels.backward`.
DETERMINISTIC_BACKWARD = 1.4
_LAYOUT = ("cat", "clone", "copy", "slice", "constant_pad", "index", "embedding", "stack")
# Share of the largest tensor's bytes that a rank sends, of n ranks.
_SENT = {
    "allreduce_": lambda n: 2 * (n - 1) / n,
    "_allgather_base_": lambda n: (n - 1) / n,
    "allgather_": lambda n: n - 1,
    "_reduce_scatter_base_": lambda n: (n - 1) / n,
    "reduce_scatter_": lambda n: n - 1,
    # Each rank passes the whole of it on, all at the same time.
    "reduce_": lambda n: 1.0,
    "broadcast_": lambda n: 1.0,
}


@dataclass(frozen=True)
class StepTime:
    """How long a step takes, and what for.

    Attributes:
        seconds: of the step.
        needed: seconds of the floating-point operations that it cannot do without, at the peak.
        losses: what goes beyond, in seconds by reason; they add up to the difference.
        messages: seconds of messages by group, hidden ones among them.
        host_seconds: that the host takes to launch a step.
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
    """Return the time of a step whose pipeline has the traced stages; the slowest of them sets the pace."""
    parallel = recipe.parallel
    of_stage = {stage: Rank(trace, recipe, hardware) for stage, trace in stages.items()}
    slowest = max(of_stage.values(), key=lambda rank: rank.inside)
    trace = slowest.trace
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
    """Seconds of one rank: inside the pipeline, and outside of it, where gradients are reduced and weights updated."""

    def __init__(self, trace: Trace, recipe: Recipe, hardware: Hardware) -> None:
        self.trace, self._hardware = trace, hardware
        self._backward = DETERMINISTIC_BACKWARD if recipe.deterministic else 1.0
        self._overlaps = recipe.parallel.virtual_pipeline > 1
        self.losses_inside: defaultdict[str, float] = defaultdict(float)
        self.losses_outside: defaultdict[str, float] = defaultdict(float)
        self.messages: defaultdict[str, float] = defaultdict(float)
        self._needed = self._host_inside = self._host_outside = self._beside_all = 0.0
        for key, work in trace.work.items():
            self._count(key, work)
        self._send_all()
        busy = self._needed + sum(self.losses_inside.values())
        exposed = max(0.0, self._beside_all - busy)
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
        """Return what all kernels of an entry take on the device."""
        hardware = self._hardware
        memory = work.bytes / (hardware.stream * hardware.memory_bandwidth)
        if key.is_product:
            peak = hardware.fp32_flops if key.name.endswith(IN_FP32) else hardware.peak
            # What is put together from steps of other sizes counts some of them negatively.
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
                self._beside_all += seconds
                continue
            inside = between or (key.phase == "gradients" and bool(key.part))
            losses = self.losses_inside if inside else self.losses_outside
            losses[f"{key.direction}-parallel messages"] += seconds - hidden.get(key, 0.0)

    def _hidden(self) -> dict[Key, float]:
        """Return the seconds of each entry's messages that computation covers.

        A message lasts beside what is computed until it is waited for; those of a group come one after the other, so
        that together they hide no more than what is computed while any of them is under way.
        """
        hidden: dict[Key, float] = {}
        covered: dict[str, float] = defaultdict(float)
        for key, message in self.trace.messages.items():
            beside = self.kernel_seconds(_MIXED, message.beside)
            hidden[key] = min(message_seconds(key, message, self._hardware), beside, key=abs)
            covered[links_of(key.direction)] += self.kernel_seconds(_MIXED, message.alone)
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
    """Return what all messages of an entry take on the links of their group."""
    if len(message.ranks) < 2:
        return 0.0
    of_node = Counter(rank // hardware.gpus_per_node for rank in message.ranks)
    stays, in_node = len(of_node) == 1, min(of_node.values())
    latency = message.calls * hardware.latency_seconds[0 if stays else 1]
    if key.name == "alltoall_base_":
        return _all_to_all(message.bytes, len(message.ranks), in_node, hardware) + latency
    # The ranks of a group in one node share out their network cards.
    link = hardware.node_bandwidth if stays else min(hardware.node_bandwidth, in_node * hardware.network_bandwidth)
    sent = message.bytes * _SENT.get(key.name, lambda _: 1.0)(len(message.ranks))
    return sent / (hardware.collective * link) + latency


def _all_to_all(size: float, ranks: int, in_node: int, hardware: Hardware) -> float:
    """Return the seconds of `size` bytes, a share of which a rank has for each: over its links inside the node, and at
    the same time over its network card.
    """
    inside = (in_node - 1) / ranks * size / hardware.node_bandwidth
    across = (ranks - in_node) / ranks * size / hardware.network_bandwidth
    return max(inside, across) / hardware.collective


def reason(key: Key) -> str:
    """Return why the time of a kernel inside the model is not that of the peak, for people."""
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


# What shrinks each loss.
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
    "pipeline-parallel messages": "parallel.virtual_pipeline above 1: they run beside computation",
    "data-parallel messages": "a larger global batch, or more model-parallel ranks: fewer bytes a step",
    "model-parallel messages": "nothing in a recipe",
    "pipeline bubble": "parallel.virtual_pipeline, or more micro-batches: a smaller micro-batch, a larger global batch",
    "update of the weights": "a larger global batch: fewer updates",
    _REDUCTION: "a larger global batch",
    _LAUNCHES: "a larger micro-batch: more work a kernel",
    "stages of unequal work": "parallel.layers_per_chunk: fewer layers beside the head",
    "products that nothing reads": "nothing in a recipe",
}


def largest(losses: Mapping[str, float], count: int = 5) -> Sequence[tuple[str, float, str]]:
    """Return the largest losses with what would shrink each."""
    ordered = sorted(losses.items(), key=lambda item: -item[1])[:count]
    return [(name, seconds, REMEDIES[name]) for name, seconds in ordered]
