"""Compare the fused kernels between a layer's products with plain PyTorch, as a part of `tools/gpu_day.py`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bd3_scale.fused.cross_entropy import logit_gradient_, row_statistics
from bd3_scale.fused.ops import ENVIRONMENT, TRAFFIC
from tests.fused.cases import Case, check_case, check_logits, heads_case, logits_case, norm_case, swiglu_case
from tools.bench_attention import Clock

Row = dict[str, Any]
# Relative to a result's norm: one rounding, and sums. See tests/fused/test_kernels_gpu.py.
TOLERANCE = {torch.bfloat16: 4e-3, torch.float32: 2e-6}


def fused_rows(dry: bool) -> Iterator[Row]:
    """Yield, for each kernel, whether it is correct, its time against plain PyTorch, and its bytes against a copy."""
    device, dtype = ("cpu", torch.float32) if dry else ("cuda", torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    clock = Clock(device, quick=dry)
    copy = clock.copy_rate()
    yield {"case": "a copy", "GB/s": copy / 1e9}
    rows, sizes = ((2, 2), [64]) if dry else ((2048, 8), [2048, 4096])
    for size in sizes:
        heads = (2, 2, 16) if dry else (size // 512, 4, 128)
        cases = {
            f"swiglu, {3 * size} channels": swiglu_case(rows, 3 * size, generator),
            f"residual and norm, {size} channels": norm_case(rows, size, generator),
            f"q, k, v of {heads[0]} × {heads[1]} heads": heads_case(rows, *heads, True, generator),
            "the same without norms": heads_case(rows, *heads, False, generator),
        }
        for name, case in cases.items():
            yield from case_rows(name, case, dtype, device, clock, copy)
    for size in (300,) if dry else (32_128, 152_064):
        yield from logits_rows(size, dtype, device, clock, copy)


def case_rows(name: str, case: Case, dtype: torch.dtype, device: str, clock: Clock, copy: float) -> Iterator[Row]:
    ok = agrees(lambda: check_case(case, dtype, TOLERANCE[dtype], device))
    leaves = [x.to(device, dtype).requires_grad_() for x in case.leaves]
    rest = [x.to(device, dtype) for x in case.rest]

    def forward() -> tuple[Tensor, ...]:
        found = case.function(*leaves, *rest)
        return found if isinstance(found, tuple) else (found,)

    def backward_of(outputs: tuple[Tensor, ...]) -> Callable[[], object]:
        grads = [torch.randn_like(x) for x in outputs]
        return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)

    with plain():
        rival = backward_of(forward())
    passes: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "forward": (forward, forward),
        "backward": (backward_of(forward()), rival),
    }
    for what, (run, plain_run) in passes.items():
        yield timed(f"{name}, {what}", run, plain_run, clock, copy) | ok


def logits_rows(size: int, dtype: torch.dtype, device: str, clock: Clock, copy: float) -> Iterator[Row]:
    case = logits_case(4 if device == "cpu" else (1 << 26) // size, size, torch.Generator().manual_seed(0))
    ok = agrees(lambda: check_logits(case, dtype, max(TOLERANCE[dtype], 1e-4), device))
    logits, targets, forbidden = case.logits.to(device, dtype), case.targets.to(device), case.forbidden.to(device)
    given = (targets, case.first_id, forbidden)
    log_total = torch.full((len(logits),), 400.0, device=device)
    passes: dict[str, Callable[[], object]] = {
        "statistics": lambda: row_statistics(logits, *given),
        # It overwrites its input, and repeats run on the result: zeros take as long.
        "gradient": lambda: logit_gradient_(logits, *given, log_total, *case.scales.to(device)),
    }
    for what, run in passes.items():
        yield timed(f"cross-entropy of {size} entries, {what}", run, run, clock, copy) | ok


def timed(name: str, run: Callable[[], object], rival: Callable[[], object], clock: Clock, copy: float) -> Row:
    with Moved() as moved:
        run()
    assert moved.bytes, f"{name}: no kernel ran"
    milliseconds = clock.medians({"kernel": run})["kernel"]
    with plain():
        slower = clock.medians({"plain": rival})["plain"]
    rate = moved.bytes / milliseconds * 1e3
    row: Row = {"case": name, "kernel, ms": milliseconds, "plain, ms": slower, "plain / kernel": slower / milliseconds}
    return row | {"GB/s": rate / 1e9, "of a copy's": rate / copy}


def agrees(check: Callable[[], None]) -> Row:
    try:
        check()
    except AssertionError as error:
        return {"ok": False, "why": str(error).splitlines()[0]}
    return {}


@contextmanager
def plain() -> Iterator[None]:
    """Let plain PyTorch compute inside this context."""
    os.environ[ENVIRONMENT] = "plain"
    try:
        yield
    finally:
        del os.environ[ENVIRONMENT]


class Moved(TorchDispatchMode):
    """Counts the bytes of kernels that run inside this context, by their formulas."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "bd3_scale":
            self.bytes += TRAFFIC[func._schema.name.partition("::")[2]](*args)
        return func(*args, **(kwargs or {}))
