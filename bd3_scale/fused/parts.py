"""Parts of tensors that pass through several operators while they are in a CPU's caches: memory is slower than that."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Numbers of a part and thread: 512 KiB in fp32.
CACHED = 1 << 17


def parts(x: Tensor) -> Iterator[slice]:
    """Yield slices of the first dimension of `x`, in order; on other devices than a CPU one of all."""
    length = len(x)
    step = length
    if x.device.type == "cpu" and x.numel():
        step = CACHED * torch.get_num_threads() * length // x.numel()
    step = max(1, step)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
