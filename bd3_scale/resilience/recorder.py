"""The collectives that this rank waits in, by PyTorch's flight recorder: a stack does not name those of a GPU."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

# Of NCCL, in builds with it, and of all other backends.
_DUMPS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
_MOST = 20


def tell_collectives() -> list[str]:
    """Return a line for each collective that has begun and not ended, the oldest first, and for the last that ended.

    Nothing where torch.distributed is not in use, or a person has switched the recorder off (TORCH_FR_BUFFER_SIZE=0).
    """
    entries = sorted(_entries(), key=lambda entry: entry["time_created_ns"])
    if not entries:
        return []
    rank = f"rank {os.environ.get('RANK', '0')}"
    # Gloo's keep the state that they began with.
    ended = [entry for entry in entries if entry["state"] == "completed" or entry["retired"]]
    waiting = [entry for entry in entries if entry["state"] != "completed" and not entry["retired"]]
    lines = [f"{rank} waits in {_named(entry)}, for {_age(entry):.0f} s" for entry in waiting[:_MOST]]
    lines += [f"{rank} waits in {len(waiting) - _MOST} more after these"] * (len(waiting) > _MOST)
    lines += [f"{rank} waits in no collective"] * (not waiting)
    return lines + [f"{rank} ended last {_named(entry)}" for entry in ended[-1:]]


def _entries() -> Iterator[dict[str, Any]]:
    """What the recorder holds, as JSON: a pickle would be code of whoever wrote it."""
    torch = sys.modules.get("torch._C._distributed_c10d")
    for name in _DUMPS:
        if (dump := getattr(torch, name, None)) is not None:
            yield from json.loads(dump()).get("entries", ())


def _named(entry: dict[str, Any]) -> str:
    """Its name, its number among those of its group, and what it sends."""
    name, description = entry["process_group"]
    number = entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"]
    sizes = ", ".join(f"{kind} {size}" for kind, size in zip(entry["input_dtypes"], entry["input_sizes"], strict=False))
    group = description if description and description != "undefined" else f"group {name}"
    return f"{entry['profiling_name']} {number} of {group} ({sizes or 'nothing'})"


def _age(entry: dict[str, Any]) -> float:
    return time.time() - entry["time_created_ns"] * 1e-9
