"""Exchange values and errors between ranks, and run actions on one rank for all.

Ranks send JSON and raw numbers, never pickles. `torch.distributed.all_gather_object` would unpickle what it receives,
and whoever could send a pickle could run code on all ranks.
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

# The errors that are sent to other ranks, by name; the first that fits is taken. For an OSError the error number, which
# is sent as well, decides on the subclass.
_ERRORS: dict[str, type[ValueError | OSError]]
_ERRORS = {"connection": ConnectionError, "system": OSError, "value": ValueError}


def on_rank_zero(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run `action` on rank 0 and return its result, which must be a value of JSON, on all ranks (collective).

    group: a group of all ranks; by default the one that training uses.

    Raises:
        ValueError, OSError: on every rank, if `action` raised it on rank 0; no rank is left waiting.
    """
    outcome, raised = _outcome(action) if dist.get_rank() == 0 else ({}, None)
    received = json.loads(_broadcast(_as_json(outcome), group))
    if raised is not None:
        # The original, with its traceback.
        raise raised
    raise_error_of(received)
    return received["value"]


def on_first_of_node(action: Callable[[], T]) -> T:
    """Run `action` on the first rank of each node and return its result on all ranks of the node (collective).

    The result must be a value of JSON. A single process without torch.distributed runs it directly.

    Raises:
        ValueError, OSError: on every rank, if `action` raised it on any node; no rank is left waiting.
    """
    if not dist.is_initialized():
        return action()
    first = dist.get_rank() - dist.get_rank() % int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    outcome, raised = _outcome(action) if dist.get_rank() == first else ({}, None)
    outcomes = gather_values(outcome)
    if raised is not None:
        raise raised
    for received in outcomes:
        raise_error_of(received)
    return outcomes[first]["value"]


def any_rank(flag: bool) -> bool:
    """Return whether `flag` is set on any rank (collective)."""
    return bool(largest(flag)[0])


def largest(*values: float) -> list[float]:
    """Return the maximum over all ranks of each value (collective)."""
    maxima = torch.zeros(len(values), dtype=torch.float64, device=_device(None))
    for element, value in zip(maxima, values, strict=True):
        # `fill_` takes the number as an argument of a kernel; a copy to the device would make the host wait.
        element.fill_(value)
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
    return maxima.tolist()


def gather_values(value: T, group: dist.ProcessGroup | None = None) -> Sequence[T]:
    """Return the values of all ranks of `group` (default: all ranks), in the order of ranks (collective).

    value: a value of JSON.
    """
    return [json.loads(each) for each in gather_bytes(_as_json(value), group)]


def gather_tensors(tensor: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Return the CPU tensors of all ranks of `group`, of one dtype and any shapes, in rank order (collective)."""
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
    """Return the bytes of all ranks of `group`, in the order of ranks (collective)."""
    device, world = _device(group), dist.get_world_size(group)
    sizes = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(data)], device=device), group=group)
    if dist.get_backend(group) == "fake":
        # The simulated world of `plan`: all other ranks are taken to send what this one sends.
        return [data] * world
    longest = max(int(size) for size in sizes)
    parts = [torch.empty(longest, dtype=torch.uint8, device=device) for _ in range(world)]
    dist.all_gather(parts, _as_tensor(data.ljust(longest, b"\0"), device), group=group)
    return [part.cpu().numpy().tobytes()[: int(size)] for part, size in zip(parts, sizes, strict=True)]


def _broadcast(data: bytes, group: dist.ProcessGroup | None) -> bytes:
    """Return rank 0's bytes on every rank."""
    device = _device(group)
    size = torch.tensor([len(data)], device=device)
    dist.broadcast(size, src=0, group=group)
    sent = dist.get_rank() == 0
    part = _as_tensor(data, device) if sent else torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(part, src=0, group=group)
    return part.cpu().numpy().tobytes()


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """Return the device on which the tensors of a group's collectives must be."""
    on_gpu = dist.get_backend(group) != dist.Backend.GLOO and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _as_tensor(data: bytes, device: torch.device) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy()).to(device)


def _as_json(value: object) -> bytes:
    text = json.dumps(value, allow_nan=False)
    # JSON turns tuples into lists and keys into strings, silently.
    assert json.loads(text) == value, "tuples, and keys that are not strings, would arrive as something else"
    return text.encode()


def _outcome(action: Callable[[], T]) -> tuple[dict[str, Any], ValueError | OSError | None]:
    """Run an action; return the outcome to send to other ranks, and the error that it raised."""
    try:
        return {"value": action()}, None
    except (ValueError, OSError) as error:
        return outcome_of_error(error), error


def outcome_of_error(error: ValueError | OSError) -> dict[str, Any]:
    """Return an error as a value of JSON from which other ranks raise the same error by `raise_error_of`."""
    arguments: list[Any] = [str(error)]
    if isinstance(error, OSError) and error.errno is not None:
        arguments = [error.errno, error.strerror, *([str(error.filename)] if error.filename else [])]
    kind = next(name for name, known in _ERRORS.items() if isinstance(error, known))
    return {"error": kind, "arguments": arguments}


def raise_error_of(outcome: Mapping[str, Any]) -> None:
    """Raise the error of an outcome made by `outcome_of_error`; do nothing for other outcomes."""
    if "error" in outcome:
        raise _ERRORS[outcome["error"]](*outcome["arguments"])
