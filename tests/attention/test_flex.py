"""Compare FlexAttention's mask with the dense one, its forward uncompiled on CPU, and all of it compiled on a GPU."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

from bd3_scale.attention import flex
from bd3_scale.attention.dispatch import block_attention
from bd3_scale.attention.reference import dense_mask, reference_attention
from bd3_scale.attention.spans import make_spans, take_ranges
from tests.attention.cases import document_start

HEADS, GROUPS, SCALE = 4, 2, 0.3


def blind_rows() -> torch.Tensor:
    """Return spans of a rank's rows, of which the first five see no key."""
    spans = take_ranges(WHOLE, [(40, 100)]).clone()
    spans[:3, :, :5] = 0
    spans[3:, :, :5] = torch.arange(5, dtype=torch.int32)
    return spans


PACKED = make_spans(torch.stack([document_start([7, 190, 3, 100]), document_start([201, 99])]), 8)
WHOLE = make_spans(torch.zeros(2, 300, dtype=torch.int64), 20)
TOKENS = make_spans(document_start([150, 150]).expand(2, -1), 1)
# Values: spans, noisy copies, whether clean rows are queries, number of clean keys.
FORMS = {
    "training": (PACKED, 1, True, 300),
    "two copies": (TOKENS, 2, True, 300),
    "last layer": (PACKED, 1, False, 300),
    "prefill": (WHOLE, 0, True, 300),
    "a rank's rows": (take_ranges(WHOLE, [(40, 100), (200, 260)]), 1, True, 300),
    "rows that see nothing": (blind_rows(), 1, True, 300),
}


def problem(form: str, dtype: torch.dtype, device: str = "cpu", head_dim: int = 16) -> tuple:
    spans, num_noisy, clean_queries, num_keys = FORMS[form]
    generator = torch.Generator().manual_seed(0)
    size = spans.shape[2]
    rows = {HEADS: (num_noisy + clean_queries) * size, GROUPS: num_noisy * size + num_keys}
    q, k, v = (
        # These are bfloat16 numbers, so that every precision gets the same.
        torch.randn(2, rows[heads], heads, head_dim, generator=generator).bfloat16().to(device, dtype)
        for heads in (HEADS, GROUPS, GROUPS)
    )
    return q, k, v, spans.to(device), num_noisy


@st.composite
def masks(draw: st.DrawFn) -> tuple[torch.Tensor, int, bool, int]:
    """Draw spans of sequences with different documents and block sizes, or of some rows of one sequence."""
    length = draw(st.integers(1, 12))
    sequences = []
    for _ in range(draw(st.integers(1, 2))):
        cuts = sorted(draw(st.sets(st.integers(0, length - 1), max_size=3)) | {0})
        lengths = [end - start for start, end in zip(cuts, [*cuts[1:], length], strict=True)]
        sequences.append(make_spans(document_start(lengths)[None], draw(st.integers(1, length))))
    spans = torch.cat(sequences, 1)
    num_noisy = draw(st.integers(0, 2))
    if len(sequences) == 1 and draw(st.booleans()):
        blocks = sorted({tuple(pair) for pair in spans[1:, 0].T.tolist()})
        spans = take_ranges(spans, draw(st.lists(st.sampled_from(blocks), min_size=1, unique=True).map(sorted)))
    return spans, num_noisy, num_noisy == 0 or draw(st.booleans()), length


@settings(deadline=None)  # the first call imports functorch
@given(masks())
def test_the_mask_is_the_dense_one(mask: tuple[torch.Tensor, int, bool, int]) -> None:
    spans, num_noisy, clean_queries, num_keys = mask
    want = dense_mask(spans, num_noisy=num_noisy, num_keys=num_keys, clean_queries=clean_queries)
    mask_mod = flex.make_mask_mod(spans, num_noisy, want.shape[1])
    got = create_mask(mask_mod, want.shape[0], 1, *want.shape[1:], device="cpu")
    assert torch.equal(got[:, 0], want)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_uncompiled_it_is_the_reference(form: str) -> None:
    q, k, v, spans, num_noisy = problem(form, torch.float64)
    with torch.compiler.set_stance("force_eager"):
        got = flex.flex_block_attention(q, k, v, spans, num_noisy, SCALE)
    torch.testing.assert_close(got, reference_attention(q, k, v, spans, num_noisy, SCALE), rtol=1e-12, atol=1e-12)


def test_an_empty_micro_batch_has_empty_gradients() -> None:
    q, k, v = (torch.randn(0, 600, heads, 16, requires_grad=True) for heads in (HEADS, GROUPS, GROUPS))
    out = flex.flex_block_attention(q, k, v, PACKED[:, :0], 1, SCALE)
    assert out.shape == q.shape
    assert [g.shape for g in torch.autograd.grad(out.sum(), (q, k, v))] == [q.shape, k.shape, v.shape]


def test_a_mask_is_made_once_for_spans_and_form_and_forgotten_with_them() -> None:
    with torch.compiler.set_stance("force_eager"):
        spans = PACKED.clone()
        first = flex.block_mask_of(spans, 1, 600, 600)
        assert flex.block_mask_of(spans, 1, 600, 600) is first
        assert flex.block_mask_of(spans, 1, 300, 600) is not first
        assert flex.block_mask_of(PACKED.clone(), 1, 600, 600) is not first
        spans[2] += 0
        assert flex.block_mask_of(spans, 1, 600, 600) is not first
        gc.collect()
        before = len(flex.known_masks)
        del spans
        gc.collect()
        assert len(flex.known_masks) == before - 1


@pytest.fixture
def compiled_anew():
    """Clear compiled code, so that every test compiles only for its own shapes."""
    torch._dynamo.reset()


def with_gradients(attend, q, k, v) -> tuple[torch.Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


@pytest.mark.gpu
@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_compiled_it_is_the_reference_with_its_gradients(form: str, dtype: torch.dtype) -> None:
    q, k, v, spans, num_noisy = problem(form, dtype, "cuda", head_dim=64)
    got = with_gradients(lambda *x: block_attention(*x, spans, num_noisy=num_noisy, backend="flex"), q, k, v)
    want = with_gradients(
        lambda *x: block_attention(*x, spans, num_noisy=num_noisy, backend="reference"),
        *(x.double() for x in (q, k, v)),
    )
    for g, w in zip(got, want, strict=True):
        assert (g - w).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * w.norm()
    blind = ~dense_mask(
        spans, num_noisy=num_noisy, num_keys=300, clean_queries=q.shape[1] > num_noisy * spans.shape[2]
    ).any(2)
    assert not got[0][blind].any()
    assert not got[1][blind].any()


@pytest.mark.gpu
@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.parametrize("head_dim", [48, 128, 256])
def test_compiled_it_takes_head_sizes_that_the_kernels_do_not(head_dim: int) -> None:
    q, k, v, spans, num_noisy = problem("training", torch.bfloat16, "cuda", head_dim)
    got = block_attention(q, k, v, spans, num_noisy=num_noisy, backend="flex")
    want = block_attention(q.double(), k.double(), v.double(), spans, num_noisy=num_noisy, backend="reference")
    assert (got - want).norm() <= 1e-2 * want.norm()


@pytest.mark.gpu
@pytest.mark.usefixtures("compiled_anew")
def test_compiled_it_runs_without_a_clean_stream() -> None:
    q, k, v = (torch.randn(2, 600, heads, 64, device="cuda") for heads in (HEADS, GROUPS, GROUPS))
    spans = make_spans(torch.zeros(2, 300, dtype=torch.int64), 300).cuda()
    got = block_attention(q, k, v, spans, num_noisy=2, backend="flex")
    want = block_attention(q.double(), k.double(), v.double(), spans, num_noisy=2, backend="reference")
    assert (got - want).norm() <= 1e-5 * want.norm()
