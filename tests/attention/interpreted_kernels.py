"""Compare the kernels in Triton's interpreter with the float64 reference; `test_kernels_interpreted.py` runs this."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import Phase, example, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime.errors import OutOfResources

from bd3_scale.attention.dispatch import block_attention, decode_attention
from bd3_scale.attention.kernels import launch, tiles, tuning
from bd3_scale.attention.reference import reference_attention
from bd3_scale.attention.spans import check_spans, make_spans, take_ranges
from tests.attention.cases import Problem, assert_close, document_start, outputs_and_gradients, problems

CPU = torch.device("cpu")
# No shrinking: in the interpreter, shrinking takes longer than the test's time limit.
INTERPRETED = settings(deadline=None, database=None, phases=[Phase.explicit, Phase.generate])
# The rounding of one product, and of sums of a few dozen, relative to the result's norm.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3}


# One tile has more rows and the other more keys, so lengths of a few dozen have whole, partial and ragged tiles.
TILES = {"long rows": tiles.Tile(32, 16, 4, 1), "long keys": tiles.Tile(16, 32, 4, 1)}


@pytest.fixture(autouse=True, scope="module")
def short_scans() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "SCAN", 16)
        yield


@pytest.fixture(autouse=True)
def tiles_of_tests() -> None:
    use_tiles("long rows")


def use_tiles(shape: str) -> None:
    for kernel, head_dim, dtype in itertools.product(tiles.KERNELS, (16, 32), (torch.float32, torch.float16)):
        tiles.choose(kernel, head_dim, dtype, CPU, TILES[shape])


def run(problem: Problem, dtype: torch.dtype, shape: str, *, deterministic: bool) -> None:
    use_tiles(shape)
    want = outputs_and_gradients(problem, torch.float64, "reference")
    # Deterministic mode fills new tensors with NaN, which shows numbers that the kernel does not write.
    torch.use_deterministic_algorithms(deterministic)
    assert_close(outputs_and_gradients(problem, dtype, "triton"), want, TOLERANCE[dtype])


# Long enough for full tiles on either side, with heads that share keys and two noisy copies.
LONG = Problem([[72]], [4], None, 2, True, True, 2, 1, 16, 0)


@seed(0)
@settings(INTERPRETED, max_examples=20)
@given(problem=problems(max_len=56, max_batch=2, max_heads=2), shape=st.sampled_from(sorted(TILES)))
@example(LONG, "long rows")
@example(LONG, "long keys")
def test_deterministic_backward(problem: Problem, shape: str) -> None:
    run(problem, torch.float32, shape, deterministic=True)


@seed(1)
@settings(INTERPRETED, max_examples=20)
@given(problem=problems(max_len=56, max_batch=2, max_heads=2), shape=st.sampled_from(sorted(TILES)))
@example(LONG, "long rows")
@example(LONG, "long keys")
def test_fused_backward(problem: Problem, shape: str) -> None:
    run(problem, torch.float32, shape, deterministic=False)


@seed(2)
@settings(INTERPRETED, max_examples=6)
@given(problem=problems(max_len=30, max_batch=1, max_heads=2, head_dim=32), shape=st.sampled_from(sorted(TILES)))
def test_float16(problem: Problem, shape: str) -> None:
    run(problem, torch.float16, shape, deterministic=True)


def run_through_descriptors(problem: Problem, shape: str, lay: Callable[[Tensor], Tensor] = lambda x: x) -> None:
    use_tiles(shape)
    tensors = problem.tensors(torch.float32)
    leaves = [x.double().requires_grad_() for x in tensors[:3]]
    spans, num_noisy = problem.spans(), problem.num_noisy
    want = reference_attention(*leaves, spans, num_noisy, 0.3)
    expected = [want.detach(), *torch.autograd.grad(want, leaves, tensors[3].double())]
    q, k, v, grad = map(lay, tensors)
    out, lse = launch.forward(q, k, v, spans, num_noisy, 0.3, tma=True)
    # The interpreter has no reduction through descriptors, which the fused backward needs.
    got = launch.backward(grad, q, k, v, out, lse, spans, num_noisy, 0.3, True, tma=True)
    assert_close([out, *got], expected, 2e-6)


@seed(3)
@settings(INTERPRETED, max_examples=6)
@given(
    problem=problems(max_len=40, max_batch=2, max_heads=2).filter(lambda p: p.clean_stream),
    shape=st.sampled_from(sorted(TILES)),
)
@example(LONG, "long rows")
@example(LONG, "long keys")
def test_loads_through_descriptors(problem: Problem, shape: str) -> None:
    run_through_descriptors(problem, shape)


@pytest.mark.parametrize("padding", [(0, 1), (1, 3)], ids=["strides", "address"])
def test_what_no_descriptor_can_hold_is_copied(padding: tuple[int, int]) -> None:
    """Check rows that lie 17 numbers apart, and rows of 20 that start 4 bytes after a multiple of 16."""

    def lay(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, padding)[..., padding[0] : padding[0] + x.shape[3]]

    run_through_descriptors(LONG._replace(documents=[[20]], num_noisy=1), "long keys", lay)


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
    k[1, 20:], v[1, 20:] = torch.nan, torch.nan
    got = decode_attention(q, k, v, lengths=lengths, backend="triton")
    assert_close(
        [got], [decode_attention(q.double(), k.double(), v.double(), lengths=lengths, backend="reference")], 2e-6
    )


def test_tuning_chooses_what_measures_best_and_leaves_what_was_chosen() -> None:
    kept = tiles.choices()
    timed: list[tiles.Tile] = []

    def later_is_better(run: Callable[[], None]) -> float:
        run()
        timed.append(tiles.tile_for("forward", 64, torch.float16, CPU))
        return -len(timed)

    def tune(**options: Any) -> dict[str, list[int]]:
        return tuning.tune((1, 8, 2, 64), 1, 4, torch.float16, CPU, **options)

    def listed(kernel: str) -> tuple[tiles.Tile, ...]:
        return tiles.candidates_on(CPU, kernel, 64, torch.float16)

    chosen = tune(deterministic=True, measure=later_is_better)
    assert timed[: len(listed("forward"))] == list(listed("forward"))
    for kernel in ("forward", "query_gradient", "clean_key_gradient", "noisy_key_gradient"):
        assert chosen[f"{kernel} head_dim=64 float16 sm_00"] == list(listed(kernel)[-1])
    assert "fused_gradient head_dim=64 float16 sm_00" not in chosen
    assert kept.items() <= chosen.items()

    timed.clear()
    again = tune(deterministic=False, measure=later_is_better)
    assert len(timed) == len(listed("fused_gradient"))
    assert again.keys() - chosen.keys() == {"fused_gradient head_dim=64 float16 sm_00"}
    assert chosen.items() <= again.items()


def test_a_tile_without_room_on_the_chip_is_not_chosen() -> None:
    listed = tiles.candidates_on(CPU, "forward", 128, torch.float16)

    def room_for_the_first(run: Callable[[], None]) -> float:
        if tiles.tile_for("forward", 128, torch.float16, CPU) != listed[0]:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return 1.0

    chosen = tuning.tune((1, 4, 1, 128), 1, 4, torch.float16, CPU, deterministic=True, measure=room_for_the_first)
    assert chosen["forward head_dim=128 float16 sm_00"] == list(listed[0])
