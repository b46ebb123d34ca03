"""Follow the memory of a rank's tensors over a step, from their allocation to their release."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from bd3_scale.plan.trace import Segment

# CUDA's caching allocator rounds sizes up to multiples of this many bytes.
_ROUNDED_TO = 512


@dataclass
class _Storage:
    """A tensor's memory: its bytes, the category that they count as, and whether the model allocated it."""

    size: int
    category: str
    in_model: bool


class Timeline:
    """Allocations and releases on a device, in their order.

    Attributes:
        segment: the name of the segment of the step that is running; whoever runs the step sets it.
    """

    def __init__(self, device_type: str) -> None:
        self.segment = "engine"
        self._device = device_type
        self._live: dict[int, _Storage] = {}
        self._events: list[tuple[str, _Storage, int]] = []

    def add(self, tensor: Tensor, category: str, *, in_model: bool) -> None:
        """Record the allocation of a tensor, and later its release; views of known memory add nothing."""
        if not isinstance(tensor, FakeTensor) or tensor.device.type != self._device:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        size = -(-storage.nbytes() // _ROUNDED_TO) * _ROUNDED_TO
        if not size:
            return
        stored = self._live[key] = _Storage(size, category, in_model)
        self._events.append((self.segment, stored, size))
        # A fake tensor's storage has no memory, but it dies when a real one would be released.
        weakref.finalize(storage, self._released, key, stored)

    def _released(self, key: int, stored: _Storage) -> None:
        self._live.pop(key, None)
        self._events.append((self.segment, stored, -stored.size))

    def label(self, tensor: Tensor, category: str, *, only_outside: bool = False) -> None:
        """Count the memory of a tensor as `category`, from its allocation on.

        only_outside: not if the model allocated it, or if it holds weights, optimiser states or gradients.
        """
        stored = self._live.get(tensor.untyped_storage()._cdata)
        if stored is not None and not (
            only_outside and (stored.in_model or stored.category in ("weights", "optimizer", "gradients"))
        ):
            stored.category = category

    def begin(self) -> None:
        """Forget all earlier events; what is still in memory counts from the beginning."""
        self._events = [("before", stored, stored.size) for stored in self._live.values()]

    def segments(self) -> list[Segment]:
        """Return the peak of memory in each segment since `begin`, by category."""
        return list(_segments_of(self._events))


def _segments_of(events: list[tuple[str, _Storage, int]]) -> Iterator[Segment]:
    """Yield the peak of each segment; successive events of one segment name are one segment."""
    live: Counter[str] = Counter()
    total, name, peak, at_peak = 0, "before", 0, Counter[str]()
    for segment, stored, size in events:
        if segment != name:
            yield Segment(name, dict(at_peak))
            name, peak, at_peak = segment, total, Counter(live)
        live[stored.category] += size
        total += size
        if total > peak:
            peak, at_peak = total, Counter(live)
    yield Segment(name, dict(at_peak))
