"""Draw random calls of the fused functions, with results by autograd of plain formulas in float64.

A case is a function of the package, its formula, and their arguments; those that have a gradient come first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from bd3_scale.fused.cross_entropy import logit_gradient_, row_statistics
from bd3_scale.fused.heads import qkv_heads
from bd3_scale.fused.norm import add_rms_norm
from bd3_scale.fused.swiglu import swiglu

EPS = 1e-3


class Case(NamedTuple):
    """A call `function(*leaves, *rest)`, and `formula` of the same arguments in float64."""

    function: Callable[..., Any]
    formula: Callable[..., Any]
    leaves: list[Tensor]
    rest: tuple[Any, ...] = ()

    def __repr__(self) -> str:
        return f"{self.function.__name__} of {[tuple(x.shape) for x in self.leaves]} {self.leaves[0].dtype}"


def swiglu_case(lead: tuple[int, ...], channels: int, generator: torch.Generator) -> Case:
    x = torch.randn(*lead, 2 * channels, generator=generator)
    return Case(swiglu, lambda x: F.silu(x[..., :channels]) * x[..., channels:], [x])


def norm_case(lead: tuple[int, ...], size: int, generator: torch.Generator) -> Case:
    x, more = torch.randn(2, *lead, size, generator=generator)
    weight = torch.randn(size, generator=generator)

    def formula(x: Tensor, more: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + more
        return total, total * weight / (total.square().mean(-1, keepdim=True) + EPS).sqrt()

    # The first numbers are large and cancel, so that a sum of squares in their own dtype would be wrong.
    x[..., 0] += 8
    more[..., 0] -= 8
    return Case(lambda *x: add_rms_norm(*x, EPS), formula, [x, more, weight])


def single_norm_case(lead: tuple[int, ...], size: int, generator: torch.Generator) -> Case:
    x, weight = torch.randn(*lead, size, generator=generator), torch.randn(size, generator=generator)
    formula = lambda x, w: (x, x * w / (x.square().mean(-1, keepdim=True) + EPS).sqrt())  # noqa: E731
    return Case(lambda x, w: add_rms_norm(x, None, w, EPS), formula, [x, weight])


def heads_case(
    lead: tuple[int, int], groups: int, queries: int, size: int, normed: bool, generator: torch.Generator
) -> Case:
    qkv = torch.randn(*lead, groups * (queries + 2) * size, generator=generator)
    weights = [*torch.randn(2, size, generator=generator)] if normed else []
    angle = torch.randn(*lead, size // 2, generator=generator)
    cos, sin = angle.cos().repeat(1, 1, 2), torch.cat([-angle.sin(), angle.sin()], -1)

    def turned(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        """Return x rotated by complex numbers; the sines of the second half have no sign."""
        if weight is not None:
            x = x * weight / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
        half = size // 2
        turn = torch.complex(cos[..., :half], sin[..., half:])[:, :, None]
        pairs = torch.complex(x[..., :half].contiguous(), x[..., half:].contiguous()) * turn
        return torch.cat([pairs.real, pairs.imag], -1)

    def formula(qkv: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        *given, cos, sin = rest
        q_weight, k_weight = given or (None, None)
        heads = qkv.unflatten(-1, (groups, queries + 2, size))
        query = turned(heads[..., :queries, :].flatten(2, 3), q_weight, cos, sin)
        return query, turned(heads[..., queries, :], k_weight, cos, sin), heads[..., queries + 1, :]

    def function(qkv: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        *given, cos, sin = rest
        return qkv_heads(qkv, queries, *(given or (None, None)), cos, sin, EPS)

    return Case(function, formula, [qkv, *weights], (cos, sin))


def outputs_and_gradients(
    case: Case, dtype: torch.dtype, device: str = "cpu", *, formula: bool = False
) -> list[Tensor]:
    """Return a case's results and its leaves' gradients, for numbers that `dtype` has; the formula is in float64."""
    inside = torch.float64 if formula else dtype
    leaves = [x.to(device, dtype).to(inside).requires_grad_() for x in case.leaves]
    rest = [x.to(device, dtype).to(inside) for x in case.rest]
    found = (case.formula if formula else case.function)(*leaves, *rest)
    outputs = found if isinstance(found, tuple) else (found,)
    generator = torch.Generator().manual_seed(1)
    # The gradients' memory layout differs from the outputs', as it does for transposed heads.
    grads = [torch.randn(*reversed(x.shape), generator=generator).permute(*reversed(range(x.dim()))) for x in outputs]
    directions = [x.to(device, dtype).to(inside) for x in grads]
    return [x.detach() for x in (*outputs, *torch.autograd.grad(outputs, leaves, directions))]


def check_case(case: Case, dtype: torch.dtype, tolerance: float, device: str = "cpu") -> None:
    """Compare with the formula; the error of each result is relative to its norm."""
    want = outputs_and_gradients(case, dtype, device, formula=True)
    got = outputs_and_gradients(case, dtype, device)
    for place, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == dtype
        assert a.shape == b.shape
        error = (a.double() - b).norm() / b.norm().clamp_min(1e-30)
        assert error <= tolerance, f"result {place} of {case}: {float(error):.1e}"


class Logits(NamedTuple):
    """Logits of a rank, targets of which other ranks hold some, forbidden entries, and scales of rows."""

    logits: Tensor
    targets: Tensor
    first_id: int
    forbidden: Tensor
    scales: Tensor


def logits_case(rows: int, size: int, generator: torch.Generator) -> Logits:
    logits = torch.randn(rows, size, generator=generator) * 5
    forbidden = torch.rand(size, generator=generator) < 0.2
    first_id = 1000
    targets = torch.randint(first_id - size, first_id + 2 * size, (rows,), generator=generator)
    # One row's logits are far from 0: without subtracting the highest, exponentials overflow or vanish.
    logits[: rows // 2] += 200
    return Logits(logits, targets, first_id, forbidden, torch.randn(2, rows, generator=generator))


def check_logits(case: Logits, dtype: torch.dtype, tolerance: float, device: str = "cpu") -> None:
    """Compare both pieces of the cross-entropy with formulas in float64."""
    logits, targets, forbidden, scales = (x.to(device) for x in (case.logits.to(dtype), *case[1:2], *case[3:]))
    shown = logits.double().masked_fill(forbidden, float("-inf"))
    ids = case.first_id + torch.arange(logits.shape[1], device=device)
    is_target = targets[:, None] == ids
    highest = shown.amax(1)
    total = torch.where(forbidden, 0.0, (shown - highest[:, None]).exp()).sum(1)
    own = torch.where(is_target, shown, 0.0).sum(1)
    found = row_statistics(logits, targets, case.first_id, forbidden)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0].double(), highest, rtol=0, atol=0)
    # The sum of a row without entries is 0, not NaN.
    torch.testing.assert_close(found[1].double(), total.nan_to_num(0.0), rtol=1e-5, atol=0)
    torch.testing.assert_close(found[2].double(), own, rtol=0, atol=0)

    log_total = (highest + total.log()).nan_to_num(0.0, neginf=0.0).float() + 0.5  # other ranks have entries, too
    softmax_scale, target_scale = scales.to(device)
    want = torch.where(forbidden, 0.0, (logits.double() - log_total.double()[:, None]).exp()) * softmax_scale[:, None]
    want -= is_target * target_scale[:, None].double()
    got = logits.clone()
    logit_gradient_(got, targets, case.first_id, forbidden, log_total, softmax_scale, target_scale)
    assert got.dtype == dtype
    # In fp32, an exponent of 200 has a rounding error of 1e-5.
    assert (got.double() - want).norm() <= tolerance * want.norm()


@st.composite
def cases(draw: st.DrawFn, *, widest: int = 300) -> Case:
    """Draw any case but those of logits, with sizes up to `widest` and any number of rows, including none."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    lead = (draw(st.integers(0, 4)), draw(st.integers(1, 2)))
    kind = draw(st.sampled_from(["swiglu", "norm", "heads"]))
    if kind == "heads":
        size = draw(st.sampled_from([16, 24, 32, 64, 96, 128]))
        return heads_case(lead, draw(st.integers(1, 3)), draw(st.integers(0, 4)), size, draw(st.booleans()), generator)
    size = draw(st.integers(1, widest))
    return (swiglu_case if kind == "swiglu" else norm_case)(lead, size, generator)


@st.composite
def logits_cases(draw: st.DrawFn, *, widest: int = 600) -> Logits:
    """Draw logits of up to 8 rows and `widest` entries."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    case = logits_case(draw(st.integers(0, 8)), draw(st.integers(1, widest)), generator)
    return case._replace(forbidden=torch.ones_like(case.forbidden)) if draw(st.integers(0, 9)) == 0 else case


def large_cases(lead: tuple[int, int] = (40, 2)) -> Iterator[Case]:
    """Return one case of each kind with the sizes of a real model."""
    generator = torch.Generator().manual_seed(0)
    yield swiglu_case(lead, 2816, generator)
    yield norm_case(lead, 4096, generator)
    yield heads_case(lead, 2, 4, 128, True, generator)


def kept(run: Callable[[], object]) -> set[int]:
    """Return the storages that autograd keeps when `run` is called."""
    found: set[int] = set()

    def keep(x: Tensor) -> Tensor:
        found.add(x.untyped_storage().data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        run()
    return found


def places(*tensors: Tensor) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tensors}
