"""Compare the kernels in Triton's interpreter with float64 formulas; `test_kernels_interpreted.py` runs this."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st
from triton.runtime import interpreter

from bd3_scale.fused import ops
from bd3_scale.fused.heads import qkv_heads
from bd3_scale.fused.kernels import launch, tiles
from tests.fused.cases import Case, Logits, cases, check_case, check_logits, kept, large_cases, logits_cases, places

# No shrinking: in the interpreter, shrinking takes longer than the test's time limit.
INTERPRETED = settings(deadline=None, database=None, phases=[Phase.explicit, Phase.generate])
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}


@pytest.fixture(autouse=True, scope="module")
def small_tiles() -> Iterator[None]:
    """Set small tiles, so that sizes of a few dozen have whole and ragged tiles, and programs have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "BLOCK", 64)
        patch.setattr(launch, "LOGITS", tiles.LogitsTile(128, 4))
        patch.setattr(tiles, "NUMBERS", 256)
        patch.setattr(tiles, "PARTS", 3)
        patch.setattr(tiles, "LEAST_TILES", 2)
        yield


@seed(0)
@settings(INTERPRETED, max_examples=30)
@given(cases(), st.sampled_from(list(TOLERANCE)))
def test_any_case(case: Case, dtype: torch.dtype) -> None:
    check_case(case, dtype, TOLERANCE[dtype])


@seed(1)
@settings(INTERPRETED, max_examples=15)
@given(logits_cases())
def test_any_logits(case: Logits) -> None:
    check_logits(case, torch.float32, 1e-4)
    check_logits(case, torch.float16, 1e-3)


def test_tiles_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "BLOCK", tiles.BLOCK)
    for name, value in {"NUMBERS": 2048, "PARTS": 1024, "LEAST_TILES": 8}.items():
        monkeypatch.setattr(tiles, name, value)
    for case in large_cases((3, 2)):
        check_case(case, torch.float32, 1e-6)


def operator_calls() -> list[tuple[Any, tuple[Any, ...]]]:
    """Return every operator with arguments, among them rows that are not contiguous."""
    torch.manual_seed(0)
    wide = torch.randn(5, 2, 200)
    x, more = wide[..., :96], torch.randn(5, 2, 96)
    weight, size = torch.randn(96), 16
    total, _, scale = ops.add_rms_norm(x, more, weight, 1e-5)
    cos, sin, q_weight, k_weight = (torch.randn(5, 2, size), torch.randn(5, 2, size), *torch.randn(2, size))
    grads = torch.randn(5, 2, 4, size), torch.randn(5, 2, 2, size), torch.randn(5, 2, 2, size)
    logits, targets, forbidden = torch.randn(3, 300)[:, :150], torch.tensor([-1, 40, 200]), torch.rand(150) < 0.1
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (ops.swiglu, (x,)),
        (ops.swiglu_backward, (more[..., :48], x)),
        (ops.add_rms_norm, (x, more, weight, 1e-5)),
        (ops.add_rms_norm, (x, None, weight, 1e-5)),
        (ops.row_statistics, (logits, targets, 0, forbidden)),
        (ops.logit_gradient_, (logits, targets, 0, forbidden, *torch.randn(3, 3))),
    ]
    calls += [(ops.add_rms_norm_backward, (grad, more, total, weight, scale)) for grad in (None, x)]
    for qkv, *weights in ((wide[..., : 8 * size], q_weight, k_weight), (wide[..., : 8 * size], None, None)):
        calls += [(ops.qkv_heads, (qkv, 2, *weights, cos, sin, 1e-5))]
        kept = None if weights[0] is None else qkv
        calls += [(ops.qkv_heads_backward, (*grads, kept, 2, *weights, cos, sin, 1e-5))]
    return calls


CALLS = operator_calls()


@pytest.mark.parametrize("call", range(len(CALLS)), ids=[operator.name() for operator, _ in CALLS])
def test_fakes_and_bytes_are_those_of_the_kernel(call: int) -> None:
    operator, arguments = CALLS[call]
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    name = operator.name().partition("::")[2]
    assert ops.TRAFFIC[name](*arguments) == bytes_touched(lambda: operator(*arguments))


@pytest.mark.parametrize("call", range(len(CALLS)), ids=[operator.name() for operator, _ in CALLS])
def test_rows_may_lie_apart(call: int) -> None:
    operator, arguments = CALLS[call]
    apart = tuple(laid_apart(x, 3 + i) if isinstance(x, torch.Tensor) else x for i, x in enumerate(arguments))
    together = tuple(x.contiguous() if isinstance(x, torch.Tensor) else x for x in arguments)
    found, wanted = operator(*apart), operator(*together)
    if found is None:
        found, wanted = apart[0], together[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def laid_apart(x: torch.Tensor, distance: int) -> torch.Tensor:
    """Return the same values with `distance` NaN between rows; in a vector, one other number lies between two."""
    if x.dim() == 1:
        return torch.stack([x, x], 1)[:, 0]
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + distance), float("nan"))
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def bytes_touched(run: Callable[[], object]) -> int:
    """Return the bytes at different addresses that programs load and store."""
    touched: dict[str, dict[int, int]] = {"load": {}, "store": {}}
    builder = interpreter.InterpreterBuilder

    def watched(kind: str, before: Callable[..., Any]) -> Callable[..., Any]:
        def access(self: Any, pointers: Any, *rest: Any) -> Any:
            mask = rest[0 if kind == "load" else 1].data
            size = pointers.get_element_ty().primitive_bitwidth // 8
            where = np.broadcast_to(pointers.data, mask.shape)[mask]
            touched[kind].update(dict.fromkeys(where.tolist(), size))
            return before(self, pointers, *rest)

        return access

    with pytest.MonkeyPatch.context() as patch:
        for kind in touched:
            name = f"create_masked_{kind}"
            patch.setattr(builder, name, watched(kind, getattr(builder, name)))
        run()
    return sum(sum(found.values()) for found in touched.values())


def test_every_operator_tells_its_bytes() -> None:
    assert {operator.name().partition("::")[2] for operator, _ in CALLS} == set(ops.TRAFFIC)


def test_what_the_kernels_do_not_take_is_computed_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, 16)
    assert ops.kernels_take(x)
    assert ops.kernels_take(x, norm=16_384, head=80)
    assert not ops.kernels_take(x.double())
    assert not ops.kernels_take(x, norm=16_385)
    assert not any(ops.kernels_take(x, head=size) for size in (14, 17, 258))
    monkeypatch.setenv(ops.ENVIRONMENT, "plain")
    assert not ops.kernels_take(x)
    monkeypatch.setenv(ops.ENVIRONMENT, "kernels")
    with pytest.raises(ValueError, match=r"BD3_SCALE_FUSED is 'kernels': set it to 'plain' .*, or leave it out"):
        ops.kernels_take(x)


@pytest.mark.parametrize("normed", [True, False])
def test_values_are_copied_only_where_nothing_else_keeps_their_memory(normed: bool) -> None:
    cos, sin = torch.randn(2, 5, 3, 16)
    qkv = torch.randn(5, 3, 2 * 4 * 16, requires_grad=True)
    weights = torch.randn(2, 16, requires_grad=True).unbind() if normed else (None, None)
    outputs: list[torch.Tensor] = []
    found = kept(lambda: outputs.extend(qkv_heads(qkv, 2, *weights, cos, sin, 1e-5)))
    assert (places(outputs[2]) == places(qkv)) is normed
    assert (places(qkv) <= found) is normed
    assert not places(*outputs[:2]) & found
