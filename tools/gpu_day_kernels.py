"""Compare the attention kernels with float64, as a part of `tools/gpu_day.py`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from bd3_scale.attention.dispatch import decode_attention
from tests.attention.cases import FORMS, Problem, dense_attention, errors, outputs_and_gradients

Row = dict[str, Any]


def kernel_rows(dry: bool) -> Iterator[Row]:
    """Yield errors against float64, and those of PyTorch's attention in the same dtype, which rounds at the same
    places."""
    torch.manual_seed(0)
    if dry:
        tiny = Problem([[23, 17]], [4], None, 1, True, True, 2, 1, 16, 0)
        changed = {"training": tiny, "two copies": tiny._replace(num_noisy=2)}
        forms = changed | {"next token": tiny._replace(num_noisy=0, block_sizes=[1])}
        cases = [(name, problem, torch.float32) for name, problem in forms.items()]
    else:
        wide = {name: problem._replace(head_dim=128) for name, problem in FORMS.items()}
        training = wide.pop("training")
        large = training._replace(documents=[[700, 324], [1024]], block_sizes=[16, 16], heads=8)
        sizes = {f"blocks of {size}": large._replace(block_sizes=[size] * 2) for size in (1, 4, 16, 300, 1024)}
        heads = {f"head_dim {size}": training._replace(head_dim=size) for size in (64, 256)}
        groups = {f"{n} key heads for 8": large._replace(groups=n) for n in (1, 8)}
        named = {"training": training} | heads | wide | sizes | groups
        cases = [(name, problem, torch.bfloat16) for name, problem in named.items()]
        cases.insert(3, ("head_dim 64", heads["head_dim 64"], torch.float32))
    for name, problem, dtype in cases:
        yield from kernel_errors(name, problem, dtype, "cpu" if dry else "cuda")
    head_dims = (16,) if dry else (64, 128, 256)
    for head_dim, lengths in itertools.product(head_dims, (None, (33, 0))):
        yield decode_errors(head_dim, lengths, torch.float32 if dry else torch.bfloat16, "cpu" if dry else "cuda")


def kernel_errors(name: str, problem: Problem, dtype: torch.dtype, device: str) -> Iterator[Row]:
    torch.use_deterministic_algorithms(False)
    want = outputs_and_gradients(problem, torch.float64, "reference", device=device)
    rival = errors(dense_attention(problem, dtype, problem.mask().to(device)), want)
    for deterministic in (True, False):
        torch.use_deterministic_algorithms(deterministic)
        got = outputs_and_gradients(problem, dtype, "triton", device=device)
        found = errors(got, want)
        row = {"case": name, "dtype": short(dtype), "backward": "deterministic" if deterministic else "fused"}
        row |= {f"{what}, error": error for what, error in found.items()}
        worst = max(found, key=lambda what: over(found[what], rival[what], dtype))
        row["of PyTorch's, at worst"] = found[worst] / rival[worst]
        if not over(found[worst], rival[worst], dtype) <= 1:
            row |= {"ok": False, "why": f"{worst}: {found[worst]:.1e}, PyTorch's {rival[worst]:.1e}"}
        if deterministic:
            repeats = 1 if device == "cpu" else 10
            again = (outputs_and_gradients(problem, dtype, "triton", device=device) for _ in range(repeats))
            row["bitwise again"] = all(all(map(torch.equal, got, other)) for other in again)
            if not row["bitwise again"]:
                row |= {"ok": False, "why": "the deterministic backward differs from run to run"}
        yield row


def over(error: float, rival: float, dtype: torch.dtype) -> float:
    """Return the error relative to the allowed one: twice the error of PyTorch's attention in the same dtype.

    float32 products may run on tensor cores as three tf32 products, which lose a little more than float32.
    """
    return error / max(2 * rival, 1e-5 if dtype == torch.float32 else 0.0)


def decode_errors(head_dim: int, lengths: Sequence[int] | None, dtype: torch.dtype, device: str) -> Row:
    keys, heads = (60, 4) if device == "cpu" else (4096, 32)
    q = torch.randn(2, 16, heads, head_dim, device=device, dtype=dtype)
    k, v = torch.randn(2, 2, keys, heads // 4, head_dim, device=device, dtype=dtype)
    seen = None if lengths is None else torch.tensor(lengths, device=device)
    want = [decode_attention(q.double(), k.double(), v.double(), lengths=seen, backend="reference")]
    found, rival = (
        errors([decode_attention(q, k, v, lengths=seen, backend=backend)], want)["output"]
        for backend in ("triton", "reference")
    )
    case = f"decode, head_dim {head_dim}, {keys if lengths is None else list(lengths)} keys"
    row = {"case": case, "dtype": short(dtype), "output, error": found, "of PyTorch's, at worst": found / rival}
    return row if over(found, rival, dtype) <= 1 else row | {"ok": False, "why": f"{found:.1e}, PyTorch's {rival:.1e}"}


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
