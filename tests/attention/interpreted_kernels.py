"""The kernels in Triton's interpreter against the float64 reference; run by `test_kernels_interpreted.py`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import Phase, example, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from bd3_scale.attention.dispatch import block_attention, decode_attention
from bd3_scale.attention.kernels import launch, tiles, tuning
from bd3_scale.attention.reference import reference_attention
from bd3_scale.attention.spans import check_spans, make_spans, take_ranges
from tests.attention.cases import Problem, document_start, outputs_and_gradients, problems

CPU = torch.device("cpu")
# Nothing is shrunk: in the interpreter that takes longer than the test may.
INTERPRETED = settings(deadline=None, database=None, phases=[Phase.explicit, Phase.generate])
NAMES = ("output", "gradient of q", "gradient of k", "gradient of v")
# Rounding of one product, of sums of a few dozen, in parts of the result's norm.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3}


@pytest.fixture(autouse=True, scope="module")
def small_tiles() -> None:
    """Tiles of 16: a sequence of 40 has whole, partial and ragged ones."""
    for kernel in tiles.KERNELS:
        for dtype in (torch.float32, torch.float16):
            tiles.choose(kernel, 16, dtype, CPU, tiles.Tile(16, 16, 4, 1))


def assert_close(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    for name, g, w in zip(NAMES, got, want, strict=False):
        error = float((g.double() - w).norm())
        # A softmax over one key has no gradient: there, rounding of terms of the output's size remains.
        size = float(w.norm()) + 0.1 * float(want[0].norm())
        assert error <= tolerance * size, f"{name}: {error / size:.1e} of its norm"


def run(problem: Problem, dtype: torch.dtype, *, deterministic: bool) -> None:
    want = outputs_and_gradients(problem, torch.float64, "reference")
    # Deterministic mode fills new tensors with NaN, so that what a kernel does not write is seen.
    torch.use_deterministic_algorithms(deterministic)
    assert_close(outputs_and_gradients(problem, dtype, "triton"), want, TOLERANCE[dtype])


# Long enough for full tiles on either side, with heads that share keys and two noisy copies.
LONG = Problem([[48]], [4], None, 2, True, True, 2, 1, 16, 0)


@seed(0)
@settings(INTERPRETED, max_examples=22)
@given(problem=problems(max_len=40, max_batch=2, max_heads=2))
@example(LONG)
def test_deterministic_backward(problem: Problem) -> None:
    run(problem, torch.float32, deterministic=True)


@seed(1)
@settings(INTERPRETED, max_examples=22)
@given(problem=problems(max_len=40, max_batch=2, max_heads=2))
@example(LONG)
def test_fused_backward(problem: Problem) -> None:
    run(problem, torch.float32, deterministic=False)


@seed(2)
@settings(INTERPRETED, max_examples=6)
@given(problem=problems(max_len=30, max_batch=1, max_heads=2))
def test_float16(problem: Problem) -> None:
    run(problem, torch.float16, deterministic=True)


def run_through_descriptors(problem: Problem, lay: Callable[[Tensor], Tensor]) -> None:
    tensors = problem.tensors(torch.float32)
    leaves = [x.double().requires_grad_() for x in tensors[:3]]
    spans, num_noisy = problem.spans(), problem.num_noisy
    want = reference_attention(*leaves, spans, num_noisy, 0.3)
    expected = [want.detach(), *torch.autograd.grad(want, leaves, tensors[3].double())]
    q, k, v, grad = map(lay, tensors)
    out, lse = launch.forward(q, k, v, spans, num_noisy, 0.3, tma=True)
    got = launch.backward(grad, q, k, v, out, lse, spans, num_noisy, 0.3, True, tma=True)
    assert_close([out, *got], expected, 2e-6)


@seed(3)
@settings(INTERPRETED, max_examples=10)
@given(problem=problems(max_len=40, max_batch=2, max_heads=2).filter(lambda p: p.clean_stream))
@example(LONG)
def test_loads_through_descriptors(problem: Problem) -> None:
    run_through_descriptors(problem, lambda x: x)


@pytest.mark.parametrize("padding", [(0, 1), (1, 3)], ids=["strides", "address"])
def test_what_no_descriptor_can_hold_is_copied(padding: tuple[int, int]) -> None:
    """Rows 17 numbers apart; rows of 20 that start 4 bytes beyond a multiple of 16."""

    def lay(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, padding)[..., padding[0] : padding[0] + x.shape[3]]

    run_through_descriptors(LONG._replace(documents=[[20]], num_noisy=1), lay)


@seed(4)
@settings(INTERPRETED, max_examples=12)
@given(
    st.integers(1, 3), st.integers(1, 20), st.integers(1, 300), st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    st.booleans(), st.integers(0, 999),
)  # fmt: skip
def test_decode(batch: int, num_queries: int, num_keys: int, heads: tuple[int, int], ragged: bool, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    q = torch.randn(batch, num_queries, heads[0], 16, generator=generator)
    k, v = torch.randn(2, batch, num_keys, heads[1], 16, generator=generator)
    lengths = torch.randint(0, num_keys + 1, (batch,), generator=generator) if ragged else None
    got = decode_attention(q, k, v, lengths=lengths, backend="triton")
    want = decode_attention(q.double(), k.double(), v.double(), lengths=lengths, backend="reference")
    assert_close([got], [want], 2e-6)


@pytest.mark.parametrize("deterministic", [True, False])
def test_rows_that_see_nothing(deterministic: bool) -> None:
    spans = take_ranges(make_spans(document_start([20, 13])[None], 4), [(0, 33)])
    # Rows 5 to 7 see neither clean nor noisy keys, and their noisy keys are seen by none.
    spans[:3, :, 5:8] = 8
    spans[0, :, 8:20] = 8
    spans[3:, :, 4] = torch.tensor([[4], [5]])
    spans[3:, :, 5:8] = torch.arange(5, 8)
    check_spans(spans, num_keys=33)
    q, k, v, grad = (torch.randn(1, 66, 2, 16) for _ in range(4))
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    want = reference_attention(*leaves, spans, 1, 0.3)
    torch.use_deterministic_algorithms(deterministic)
    out, lse = launch.forward(q, k, v, spans, 1, 0.3)
    got = launch.backward(grad, q, k, v, out, lse, spans, 1, 0.3, deterministic)
    assert_close([out, *got], [want.detach(), *torch.autograd.grad(want, leaves, grad.double())], 2e-6)
    assert not out[:, 5:8].any()
    assert not got[0][:, 5:8].any()


def test_bfloat16_is_refused_since_the_interpreter_gets_it_wrong() -> None:
    x = torch.zeros(1, 4, 1, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="interpreter multiplies bfloat16 wrongly"):
        decode_attention(x, x, x, backend="triton")


@pytest.mark.parametrize("deterministic", [True, False])
def test_every_tensor_has_strides_of_its_own(deterministic: bool) -> None:
    problem = LONG._replace(documents=[[20]], num_noisy=1)
    layouts = [(2, 0, 1, 3), (1, 2, 0, 3), (0, 2, 1, 3), (0, 3, 2, 1)]
    torch.use_deterministic_algorithms(deterministic)

    def laid_out(x: Tensor, order: tuple[int, ...]) -> Tensor:
        back = [order.index(i) for i in range(4)]
        return x.permute(order).contiguous().permute(back).requires_grad_()

    want = outputs_and_gradients(problem, torch.float64, "reference")
    for turn in range(4):
        q, k, v, grad = (laid_out(x, layouts[(i + turn) % 4]) for i, x in enumerate(problem.tensors(torch.float32)))
        out = block_attention(q, k, v, problem.spans(), backend="triton")
        assert_close([out.detach(), *torch.autograd.grad(out, (q, k, v), grad)], want, 2e-6)


def test_decode_reads_no_further_than_the_keys() -> None:
    q, (k, v) = torch.randn(2, 3, 2, 16), torch.randn(2, 2, 50, 1, 16)
    lengths = torch.tensor([[60, 0], [20, 0]])[:, 0]
    got = decode_attention(q, k, v, lengths=lengths, backend="triton")
    assert_close(
        [got], [decode_attention(q.double(), k.double(), v.double(), lengths=lengths, backend="reference")], 2e-6
    )


def test_tuning_chooses_what_measures_best_and_leaves_the_rest() -> None:
    kept = tiles.choices()
    timed: list[tiles.Tile] = []

    def later_is_better(run: Callable[[], None]) -> float:
        run()
        timed.append(tiles.tile_for("forward", 64, torch.float16, CPU))
        return -len(timed)

    options = {"deterministic": True, "measure": later_is_better}
    chosen = tuning.tune((1, 8, 2, 64), 1, 4, torch.float16, CPU, **options)
    listed = tiles.candidates_on(CPU, "forward", 64, torch.float16)
    assert timed[: len(listed)] == list(listed)
    for kernel in ("forward", "query_gradient", "clean_key_gradient", "noisy_key_gradient"):
        last = tiles.candidates_on(CPU, kernel, 64, torch.float16)[-1]
        assert chosen[f"{kernel} head_dim=64 float16 sm_00"] == list(last)
    assert "fused_gradient head_dim=64 float16 sm_00" not in chosen
    assert kept.items() <= chosen.items()
