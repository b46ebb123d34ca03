"""Divide tensors into parts that stay in a CPU's cache while several operators work on them.

Without this each operator would read and write the whole tensor in main memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# Numbers of a part for each thread: 512 KiB in fp32, about the size of a core's L2 cache.
CACHED = 1 << 17
# The most parts of a fake tensor.
_TRACED = 8


def parts(x: Tensor) -> Iterator[slice]:
    """Yield slices of the first dimension of `x`, in order; on other devices than a CPU one slice of all."""
    length = len(x)
    step = length
    if x.device.type == "cpu" and x.numel():
        step = CACHED * torch.get_num_threads() * length // x.numel()
        if isinstance(x, FakeTensor):
            # Tracing all parts of a large model would take minutes.
            step = max(step, -(-length // _TRACED))
    step = max(1, step)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
