"""Choose among the listed tiles by measured times, for one shape on one GPU."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton.testing
from triton.runtime.errors import OutOfResources

from bd3_scale.attention.kernels import launch
from bd3_scale.attention.kernels.tiles import Tile, candidates_on, choices, choose, is_chosen
from bd3_scale.attention.spans import make_spans


def _milliseconds(run: Callable[[], None]) -> float:
    return float(triton.testing.do_bench(run, return_mode="median"))


def tune(
    shape: tuple[int, int, int, int],
    num_groups: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    deterministic: bool,
    measure: Callable[[Callable[[], None]], float] = _milliseconds,
) -> dict[str, list[int]]:
    """Choose the fastest tile by `measure` for every kernel of a training step of this shape.

    Kernels that have a choice already keep it: a resumed run must not change its tiles. A tile that needs more shared
    memory or registers than the chip has is left out.

    shape: batch, seq_len, query heads and head_dim of one rank's micro-batch; deterministic: tune the deterministic
    backward, else the fused one; measure: time of a call, by default its median in milliseconds.
    Returns `choices()`.
    """
    batch, seq_len, num_heads, head_dim = shape
    of_backward = ("query_gradient", "clean_key_gradient") if deterministic else ("fused_gradient",)
    kernels = ("forward", *of_backward, "noisy_key_gradient")
    kernels = tuple(kernel for kernel in kernels if not is_chosen(kernel, head_dim, dtype, device))
    if not kernels:
        return choices()
    spans = make_spans(torch.zeros(batch, seq_len, dtype=torch.int64), block_size).to(device)
    q, grad = (torch.randn(batch, 2 * seq_len, num_heads, head_dim, dtype=dtype, device=device) for _ in range(2))
    k, v = (torch.randn(batch, 2 * seq_len, num_groups, head_dim, dtype=dtype, device=device) for _ in range(2))
    scale = head_dim**-0.5
    out, lse = launch.forward(q, k, v, spans, 1, scale)

    def forward() -> None:
        launch.forward(q, k, v, spans, 1, scale)

    def backward() -> None:
        launch.backward(grad, q, k, v, out, lse, spans, 1, scale, deterministic)

    for kernel in kernels:
        run = forward if kernel == "forward" else backward
        times: dict[Tile, float] = {}
        for tile in candidates_on(device, kernel, head_dim, dtype):
            choose(kernel, head_dim, dtype, device, tile)
            try:
                times[tile] = measure(run)
            except OutOfResources:
                times[tile] = math.inf
        choose(kernel, head_dim, dtype, device, min(times, key=times.__getitem__))
    return choices()
