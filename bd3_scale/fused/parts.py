"""Parts of tensors that pass through several operators while they are in a CPU's caches: memory is slower than that."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# Numbers of a part and thread: 512 KiB in fp32.
CACHED = 1 << 17
# At most so many parts of a tensor without data.
_TRACED = 8


def parts(x: Tensor) -> Iterator[slice]:
    """Yield slices of the first dimension of `x`, in order; on other devices than a CPU one of all."""
    length = len(x)
    step = length
    if x.device.type == "cpu" and x.numel():
        step = CACHED * torch.get_num_threads() * length // x.numel()
        if isinstance(x, FakeTensor):
            # A trace of a large model would take minutes over them.
            step = max(step, -(-length // _TRACED))
    step = max(1, step)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
