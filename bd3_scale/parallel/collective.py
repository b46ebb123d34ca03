"""Agreement between ranks on things that one of them does or sees.

What ranks tell each other travels as JSON and as raw numbers, never as a pickle: whoever could send one would have his
code run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# By which a rank ends otherwise; a number of the system decides which OSError it is.
_KINDS: dict[str, type[ValueError | OSError]]
_KINDS = {"connection": ConnectionError, "system": OSError, "value": ValueError}


def on_rank_zero(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run `action` on rank 0 and return its result, which must be a value of JSON, on all ranks (collective).

    group: of all ranks; by default the one that training uses.

    Raises:
        ValueError, OSError: on every rank, where `action` raised one on rank 0; nobody is left waiting.
    """
    outcome, raised = _outcome(action) if dist.get_rank() == 0 else ({}, None)
    found = json.loads(_broadcast(_as_json(outcome), group))
    if raised is not None:
        raise raised
    raise_told(found)
    return found["value"]


def on_first_of_node(action: Callable[[], T]) -> T:
    """Run `action` on the first rank of each node and return its result, which must be a value of JSON, on the ranks of
    the node (collective); without other ranks, here.

    Raises:
        ValueError, OSError: on every rank, where `action` raised one on any node; nobody is left waiting.
    """
    if not dist.is_initialized():
        return action()
    first = dist.get_rank() - dist.get_rank() % int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    outcome, raised = _outcome(action) if dist.get_rank() == first else ({}, None)
    outcomes = gather_values(outcome)
    if raised is not None:
        raise raised
    for found in outcomes:
        raise_told(found)
    return outcomes[first]["value"]


def any_rank(flag: bool) -> bool:
    """Return whether `flag` is set on any rank (collective)."""
    return bool(largest(flag)[0])


def largest(*values: float) -> list[float]:
    """Return the largest of all ranks of each value (collective)."""
    found = torch.zeros(len(values), dtype=torch.float64, device=_device(None))
    for place, value in zip(found, values, strict=True):
        # Filled there: a copy would wait for the device as well.
        place.fill_(value)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.tolist()


def gather_values(value: T, group: dist.ProcessGroup | None = None) -> Sequence[T]:
    """Return the value of JSON of every rank of `group`, by default of the world, in their order (collective)."""
    return [json.loads(each) for each in gather_bytes(_as_json(value), group)]


def gather_tensors(tensor: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Return the CPU tensor of every rank of `group`, of the same type but of any size, in their order (collective)."""
    if group is not None and group.size() == 1:
        return [tensor]
    shapes = gather_values(list(tensor.shape), group)
    parts = gather_bytes(tensor.contiguous().numpy().tobytes(), group)
    kind = tensor.numpy().dtype
    return [
        torch.from_numpy(np.frombuffer(part, kind).copy()).view(shape)
        for part, shape in zip(parts, shapes, strict=True)
    ]


def gather_bytes(data: bytes, group: dist.ProcessGroup | None = None) -> list[bytes]:
    """Return the bytes of every rank of `group`, in their order (collective)."""
    device, world = _device(group), dist.get_world_size(group)
    sizes = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(data)], device=device), group=group)
    if dist.get_backend(group) == "fake":
        # Ranks of a world that does not exist say what this one says.
        return [data] * world
    longest = max(int(size) for size in sizes)
    parts = [torch.empty(longest, dtype=torch.uint8, device=device) for _ in range(world)]
    dist.all_gather(parts, _as_tensor(data.ljust(longest, b"\0"), device), group=group)
    return [part.cpu().numpy().tobytes()[: int(size)] for part, size in zip(parts, sizes, strict=True)]


def _broadcast(data: bytes, group: dist.ProcessGroup | None) -> bytes:
    """Return rank 0's bytes, on every rank."""
    device = _device(group)
    size = torch.tensor([len(data)], device=device)
    dist.broadcast(size, src=0, group=group)
    sent = dist.get_rank() == 0
    part = _as_tensor(data, device) if sent else torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(part, src=0, group=group)
    return part.cpu().numpy().tobytes()


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """Return where the tensors of a group's collectives lie."""
    on_gpu = dist.get_backend(group) != dist.Backend.GLOO and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _as_tensor(data: bytes, device: torch.device) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy()).to(device)


def _as_json(value: object) -> bytes:
    text = json.dumps(value, allow_nan=False)
    assert json.loads(text) == value, "tuples and keys that are no text would arrive as something else"
    return text.encode()


def _outcome(action: Callable[[], T]) -> tuple[dict[str, Any], ValueError | OSError | None]:
    """Return what to tell other ranks of an action, which this one runs, and what it raised."""
    try:
        return {"value": action()}, None
    except (ValueError, OSError) as error:
        return told_error(error), error


def told_error(error: ValueError | OSError) -> dict[str, Any]:
    """Return as JSON what other ranks must know to raise an error of the same kind, see `raise_told`."""
    arguments: list[Any] = [str(error)]
    if isinstance(error, OSError) and error.errno is not None:
        arguments = [error.errno, error.strerror, *([str(error.filename)] if error.filename else [])]
    kind = next(name for name, known in _KINDS.items() if isinstance(error, known))
    return {"error": kind, "arguments": arguments}


def raise_told(outcome: Mapping[str, Any]) -> None:
    """Raise the error that `told_error` has told; nothing else is one."""
    if "error" in outcome:
        raise _KINDS[outcome["error"]](*outcome["arguments"])
