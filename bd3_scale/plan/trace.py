"""What a rank's step consists of, as numbers that add up: work, messages, waits, and memory over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm")
IN_FP32 = " in fp32"
# Groups of ranks that have the same weights, all of them or experts, by how messages between them are called.
REPLICAS = ("data", "expert-data")


class Key(NamedTuple):
    """What is counted together.

    Attributes:
        phase: of the step.
        part: of the model; empty outside it.
        direction: forward, backward or recomputed; of a message the group that it goes over.
        name: of the operator or collective; of products of fp32 matrices it says so.
        shape: of a product or message inside the model, and of a message what is computed beside it; elsewhere it
            follows from the number of layers.
    """

    phase: str
    part: str
    direction: str
    name: str
    shape: str

    @property
    def is_product(self) -> bool:
        return is_product(self.name)


@dataclass
class Work:
    """Kernels: how many, their floating-point operations, and bytes of their inputs and outputs."""

    calls: float = 0
    flops: float = 0
    bytes: float = 0

    def add(self, flops: float, moved: float) -> None:
        """Count one kernel."""
        self.calls += 1
        self.flops += flops
        self.bytes += moved


@dataclass
class Message:
    """Collectives or messages over one group: how many, and bytes of the largest tensor of each.

    Attributes:
        ranks: of the group, or the two of a message, which say what lies in one node.
        beside: what the device computes between the begin of each and the wait for it.
        alone: of that, what it computes while no older message of the group is under way.
    """

    ranks: tuple[int, ...]
    calls: float = 0
    bytes: float = 0
    beside: Work = field(default_factory=Work)
    alone: Work = field(default_factory=Work)

    def add(self, other: Message, weight: float = 1.0) -> None:
        """Count others of the same group."""
        self.calls += weight * other.calls
        self.bytes += weight * other.bytes
        _add_work(self.beside, other.beside, weight)
        _add_work(self.alone, other.alone, weight)


class Sent(NamedTuple):
    """A collective, or a message between two ranks.

    Attributes:
        ranks: of its group.
        tensors: their types and shapes.
        peer: of a message, the other rank.
    """

    ranks: tuple[int, ...]
    name: str
    tensors: str
    peer: int | None


@dataclass
class Segment:
    """A stretch of a step, and what was in memory when it was most, in bytes by kind."""

    name: str
    memory: dict[str, float]

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())


@dataclass
class Trace:
    """One rank's step.

    Attributes:
        micro_batches: of the step.
        flops: that the whole model needs for this rank's positions, of all micro-batches.
        parameters: of the whole model.
        order: what was sent, from the first step on.
    """

    segments: list[Segment]
    work: dict[Key, Work]
    messages: dict[Key, Message]
    waits: dict[str, float]
    micro_batches: float = 0
    flops: float = 0
    parameters: float = 0
    order: list[Sent] = field(default_factory=list)

    @property
    def peak(self) -> Segment:
        """Return where memory is most."""
        return max(self.segments, key=lambda segment: segment.bytes)


def is_product(name: str) -> bool:
    """Tell whether an operator multiplies matrices."""
    return name.removesuffix(IN_FP32) in _PRODUCTS


def links_of(group: str) -> str:
    """Return the group whose messages go over the same links as those of `group`, one after the other."""
    return REPLICAS[0] if group in REPLICAS else group


def combine(parts: Sequence[tuple[float, float, Trace]]) -> Trace:
    """Return the sum of traces, each with its weight for what adds up over a step, and for memory.

    Stretches of memory correspond in their order, whose names are the same.
    """
    names = next([segment.name for segment in trace.segments] for _, weight, trace in parts if weight)
    whole = Trace([Segment(name, {}) for name in names], {}, {}, {})
    for weight, memory_weight, trace in parts:
        if memory_weight:
            assert [segment.name for segment in trace.segments] == names, "steps of one kind have the same stretches"
            for target, segment in zip(whole.segments, trace.segments, strict=True):
                _add(target.memory, segment.memory, memory_weight)
        for key, work in trace.work.items():
            _add_work(whole.work.setdefault(key, Work()), work, weight)
        for key, message in trace.messages.items():
            whole.messages.setdefault(key, Message(message.ranks)).add(message, weight)
        _add(whole.waits, trace.waits, weight)
        whole.micro_batches += weight * trace.micro_batches
        whole.flops += weight * trace.flops
        whole.parameters += weight * trace.parameters
    return whole


def _add_work(total: Work, work: Work, weight: float) -> None:
    total.calls += weight * work.calls
    total.flops += weight * work.flops
    total.bytes += weight * work.bytes


def _add(totals: dict[str, float], values: Mapping[str, float], weight: float) -> None:
    for name, value in values.items():
        totals[name] = totals.get(name, 0.0) + weight * value
