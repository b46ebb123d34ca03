"""What a rank's step consists of, as numbers that add up: work, messages, waits, and memory over time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Key(NamedTuple):
    """What is counted together.

    Attributes:
        phase: of the step.
        part: of the model; empty outside it.
        direction: forward, backward or recomputed; of a message the group that it goes over.
        name: of the operator or collective.
        shape: of a product or message inside the model; elsewhere it follows from the number of layers.
    """

    phase: str
    part: str
    direction: str
    name: str
    shape: str


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
        ranks: of the group.
        span: from its first rank to its last, which says whether it leaves a node.
    """

    ranks: int
    span: int
    calls: float = 0
    bytes: float = 0

    def add(self, size: float) -> None:
        """Count one message."""
        self.calls += 1
        self.bytes += size


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
        order: each collective: group, its ranks, name, types and shapes, and the peer of a message between two.
    """

    segments: list[Segment]
    work: dict[Key, Work]
    messages: dict[Key, Message]
    waits: dict[str, float]
    order: list[tuple[str, tuple[int, ...], str, str, int | None]] = field(default_factory=list)

    @property
    def peak(self) -> Segment:
        """Where memory is most."""
        return max(self.segments, key=lambda segment: segment.bytes)
