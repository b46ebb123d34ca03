"""Define the trace of a rank's step as numbers that can be added: work, messages, waits, and memory over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm")
IN_FP32 = " in fp32"
# Names of the groups of ranks that have the same weights: all weights, or the same experts.
REPLICAS = ("data", "expert-data")


class Key(NamedTuple):
    """The properties of operators, or of messages, that are counted together.

    Attributes:
        phase: phase of the step.
        part: part of the model; empty outside of it.
        direction: forward, backward or recomputed; for a message the group that it goes over.
        name: name of the operator or collective; products of fp32 matrices have a suffix.
        shape: for a product or message inside the model, its shape, and for a message the work that it overlaps with.
            Elsewhere it is empty, because shapes depend on the number of layers there.
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
    """The number of kernels, their floating-point operations, and the bytes of their inputs and outputs."""

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
    """Collectives or messages over one group: their number, and the bytes of the largest tensor of each.

    Attributes:
        ranks: the ranks of the group, or the two of a message; they determine which links are inside a node.
        overlapped: what the device computes between the start of each message and the wait for it.
        exclusive: the part of that which it computes while no older message of the group is pending.
    """

    ranks: tuple[int, ...]
    calls: float = 0
    bytes: float = 0
    overlapped: Work = field(default_factory=Work)
    exclusive: Work = field(default_factory=Work)

    def add(self, other: Message, weight: float = 1.0) -> None:
        """Add the numbers of other messages of the same group."""
        self.calls += weight * other.calls
        self.bytes += weight * other.bytes
        _add_work(self.overlapped, other.overlapped, weight)
        _add_work(self.exclusive, other.exclusive, weight)


class Sent(NamedTuple):
    """A collective, or a message between two ranks.

    Attributes:
        ranks: the ranks of its group.
        tensors: dtypes and shapes of its tensors.
        peer: the other rank of a message; None for a collective.
    """

    ranks: tuple[int, ...]
    name: str
    tensors: str
    peer: int | None


@dataclass
class Segment:
    """A segment of a step, and its peak of memory, in bytes by category."""

    name: str
    memory: dict[str, float]

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())


@dataclass
class Trace:
    """The trace of one rank's step.

    Attributes:
        micro_batches: their number.
        flops: the FLOPs of the whole model for this rank's positions, over all micro-batches.
        parameters: the number of parameters of the whole model.
        order: the collectives and messages, from the first step on.
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
        """Return the segment with the highest peak of memory."""
        return max(self.segments, key=lambda segment: segment.bytes)


def is_product(name: str) -> bool:
    """Say whether an operator multiplies matrices."""
    return name.removesuffix(IN_FP32) in _PRODUCTS


def links_of(group: str) -> str:
    """Return the group whose messages share links with those of `group`, so that they are sent one after the other."""
    return REPLICAS[0] if group in REPLICAS else group


def combine(parts: Sequence[tuple[float, float, Trace]]) -> Trace:
    """Return the weighted sum of traces; each has a weight for work, messages and waits, and another for memory.

    The traces must have the same segments in the same order.
    """
    names = next([segment.name for segment in trace.segments] for _, weight, trace in parts if weight)
    whole = Trace([Segment(name, {}) for name in names], {}, {}, {})
    for weight, memory_weight, trace in parts:
        if memory_weight:
            assert [segment.name for segment in trace.segments] == names, "steps to be added have the same segments"
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
