"""Describe the pending collectives of this rank, from PyTorch's flight recorder; stacks do not show those of GPUs."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

# The recorder of NCCL, in builds that have it, and the recorder of all other backends.
_DUMPS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
_MAX_LINES = 20


def describe_collectives() -> list[str]:
    """Return a line for each collective that has begun and not ended, oldest first, and one for the last that ended.

    Empty if torch.distributed is not in use or the recorder is switched off (TORCH_FR_BUFFER_SIZE=0).
    """
    entries = sorted(_entries(), key=lambda entry: entry["time_created_ns"])
    if not entries:
        return []
    rank = f"rank {os.environ.get('RANK', '0')}"
    # The entries of gloo never change their state; `retired` shows that they ended.
    ended = [entry for entry in entries if entry["state"] == "completed" or entry["retired"]]
    waiting = [entry for entry in entries if entry["state"] != "completed" and not entry["retired"]]
    lines = [f"{rank} waits in {_describe(entry)}, for {_age(entry):.0f} s" for entry in waiting[:_MAX_LINES]]
    lines += [f"{rank} waits in {len(waiting) - _MAX_LINES} more after these"] * (len(waiting) > _MAX_LINES)
    lines += [f"{rank} waits in no collective"] * (not waiting)
    return lines + [f"{rank} ended last {_describe(entry)}" for entry in ended[-1:]]


def _entries() -> Iterator[dict[str, Any]]:
    """Yield the entries of the recorder, read as JSON: unpickling its other format could run foreign code."""
    torch = sys.modules.get("torch._C._distributed_c10d")
    for name in _DUMPS:
        if (dump := getattr(torch, name, None)) is not None:
            yield from json.loads(dump()).get("entries", ())


def _describe(entry: dict[str, Any]) -> str:
    """Return the collective's name, its number within its group, and the dtypes and shapes that it sends."""
    name, description = entry["process_group"]
    number = entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"]
    inputs = zip(entry["input_dtypes"], entry["input_sizes"], strict=False)
    sizes = ", ".join(f"{dtype} {size}" for dtype, size in inputs)
    group = description if description and description != "undefined" else f"group {name}"
    return f"{entry['profiling_name']} {number} of {group} ({sizes or 'nothing'})"


def _age(entry: dict[str, Any]) -> float:
    return time.time() - entry["time_created_ns"] * 1e-9
