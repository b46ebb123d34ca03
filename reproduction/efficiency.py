"""Measure section 8: one vectorised forward against two passes, and attention backends, in turns on a quiet machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bd3_scale.attention.dispatch import block_attention
from bd3_scale.attention.spans import make_spans

BLOCK = 16
REPEATS = 7
# Sequences, tokens, hidden size, layers, heads.
SIZES = ((16, 128, 128, 4, 4), (2, 1024, 256, 4, 4))
Lap = Callable[[], object]


class PlainTransformer:
    """A plain transformer of random weights whose training pass can run as one forward or as two."""

    def __init__(self, hidden: int, layers: int, heads: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(1)
        shapes = ((3 * hidden, hidden), (hidden, hidden), (4 * hidden, hidden), (hidden, 4 * hidden))
        self.heads = heads
        self.layers = [
            [(torch.randn(shape, generator=generator) * 0.05).to(device).requires_grad_() for shape in shapes]
            for _ in range(layers)
        ]

    def once(self, noisy: Tensor, clean: Tensor, spans: Tensor) -> Tensor:
        """Return the outputs of the noisy rows from one pass over all rows; the last layer's clean rows are only
        keys."""
        rows, x = noisy.shape[1], torch.cat([noisy, clean], 1)
        for number, weights in enumerate(self.layers):
            q, k, v = self._project(x, weights[0])
            if number == len(self.layers) - 1:
                q, x = q[:, :rows], x[:, :rows]
            x = self._rest(x, block_attention(q, k, v, spans), weights)
        return x

    def twice(self, noisy: Tensor, clean: Tensor, spans: Tensor) -> Tensor:
        """Return the same from two passes: the noisy rows' pass sees the keys and values of the clean rows' pass."""
        keys = []
        for number, weights in enumerate(self.layers):
            q, k, v = self._project(clean, weights[0])
            keys.append((k, v))
            if number < len(self.layers) - 1:
                clean = self._rest(clean, block_attention(q, k, v, spans, num_noisy=0), weights)
        for weights, (clean_k, clean_v) in zip(self.layers, keys, strict=True):
            q, k, v = self._project(noisy, weights[0])
            k, v = torch.cat([k, clean_k], 1), torch.cat([v, clean_v], 1)
            noisy = self._rest(noisy, block_attention(q, k, v, spans), weights)
        return noisy

    def _project(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = F.linear(F.rms_norm(x, x.shape[-1:]), weight).unflatten(2, (3, self.heads, -1)).unbind(2)
        return q, k, v

    def _rest(self, x: Tensor, mixed: Tensor, weights: list[Tensor]) -> Tensor:
        x = x + F.linear(mixed.flatten(2), weights[1])
        return x + F.linear(F.silu(F.linear(F.rms_norm(x, x.shape[-1:]), weights[2])), weights[3])


def measure(quick: bool) -> dict[str, Any]:
    """Return milliseconds of forward and backward, medians of laps in turns; `quick`: only of the smallest size."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "device": device.type,
        "block_size": BLOCK,
        "product_gflops": _product_gflops(device),
        "sizes": [_size(*size, device) for size in SIZES[: 1 if quick else None]],
    }


def _size(batch: int, length: int, hidden: int, layers: int, heads: int, device: torch.device) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    noisy, clean = (torch.randn(batch, length, hidden, generator=generator).to(device) for _ in range(2))
    spans = make_spans(torch.zeros(batch, length, dtype=torch.int32), BLOCK).to(device)
    model = PlainTransformer(hidden, layers, heads, device)
    torch.testing.assert_close(model.once(noisy, clean, spans), model.twice(noisy, clean, spans), rtol=1e-4, atol=1e-4)
    passes: dict[str, Lap] = {
        "one pass": lambda: model.once(noisy, clean, spans).square().mean().backward(),
        "two passes": lambda: model.twice(noisy, clean, spans).square().mean().backward(),
    }
    shape = (batch, 2 * length, heads, hidden // heads)
    q, k, v = (torch.randn(shape, generator=generator).to(device).requires_grad_() for _ in range(3))
    mask = dense_mask(length).to(device)
    kernels: dict[str, Lap] = {"dense mask": lambda: _dense(q, k, v, mask).sum().backward()}
    for backend in ("triton", "flex") if device.type == "cuda" else ("cpu",):
        kernels[backend] = lambda backend=backend: block_attention(q, k, v, spans, backend=backend).sum().backward()
    torch.testing.assert_close(_dense(q, k, v, mask), block_attention(q, k, v, spans), rtol=1e-3, atol=1e-3)
    size = {"batch": batch, "length": length, "hidden": hidden, "layers": layers, "heads": heads}
    gflop = {name: _gflop(lap) for name, lap in passes.items()}
    return size | {"passes": _in_turns(passes, device), "gflop": gflop, "attention": _in_turns(kernels, device)}


def _gflop(lap: Lap) -> float:
    with FlopCounterMode(display=False) as counter:
        lap()
    return counter.get_total_flops() / 1e9


def _product_gflops(device: torch.device) -> float:
    """Return the GFLOP/s that the device reaches in one large matrix product."""
    rows, inner, columns = 4096, 512, 2048
    a, b = torch.randn(rows, inner, device=device), torch.randn(inner, columns, device=device)
    milliseconds = _in_turns({"product": lambda: a @ b}, device)["product"]
    return 2 * rows * inner * columns / milliseconds / 1e6


def dense_mask(length: int) -> Tensor:
    """Return the mask bool [2L, 2L] of one document, noisy rows before clean ones (paper, appendix B.6)."""
    block = torch.arange(length) // BLOCK
    own, before = block[:, None] == block, block[:, None] > block
    return torch.cat([torch.cat([own, before], 1), torch.cat([torch.zeros_like(own), own | before], 1)])


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _in_turns(laps: dict[str, Lap], device: torch.device) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in laps}
    for number in range(REPEATS + 1):
        for name, lap in laps.items():
            began = time.perf_counter()
            lap()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:  # the first lap warms up
                times[name].append((time.perf_counter() - began) * 1e3)
    return {name: statistics.median(laps_ms) for name, laps_ms in times.items()}
