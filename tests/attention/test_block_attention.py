"""Compare the reference with the mask's definition and PyTorch's attention, and the CPU backend with the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from bd3_scale.attention import cpu
from bd3_scale.attention.dispatch import block_attention
from bd3_scale.attention.spans import check_spans, take_ranges
from tests.attention.cases import (
    FORMS,
    TRAINING,
    Problem,
    assert_close,
    definition,
    dense_attention,
    outputs_and_gradients,
    problems,
)

EXACT, ROUNDED = 1e-12, 2e-6
property_test = settings(max_examples=60, deadline=None)


@property_test
@given(problems(max_len=24))
def test_the_mask_of_spans_is_the_definition(problem: Problem) -> None:
    check_spans(problem.spans(), num_keys=problem.seq_len)
    assert torch.equal(problem.mask(), definition(problem))


@property_test
@given(problems(max_len=24))
def test_the_reference_is_dense_attention(problem: Problem) -> None:
    want = dense_attention(problem, torch.float64, definition(problem))
    assert_close(outputs_and_gradients(problem, torch.float64, "reference"), want, EXACT)


@property_test
@given(problems(max_len=150))
def test_cpu_is_the_reference(problem: Problem) -> None:
    want = outputs_and_gradients(problem, torch.float64, "reference")
    assert_close(outputs_and_gradients(problem, torch.float32, "cpu"), want, ROUNDED)


@pytest.mark.parametrize("form", FORMS)
def test_cpu_is_the_reference_in_every_form(form: str) -> None:
    want = outputs_and_gradients(FORMS[form], torch.float64, "reference")
    assert_close(outputs_and_gradients(FORMS[form], torch.float64, "cpu"), want, EXACT)


# Longer sequences are cut into larger chunks.
@pytest.mark.parametrize(("seq_len", "block_size"), [(1100, 3), (1100, 640), (2150, 96)])
def test_cpu_is_the_reference_at_length(seq_len: int, block_size: int) -> None:
    problem = TRAINING._replace(documents=[[50, seq_len - 50]], block_sizes=[block_size], heads=1, groups=1, head_dim=4)
    want = outputs_and_gradients(problem, torch.float64, "reference")
    assert_close(outputs_and_gradients(problem, torch.float64, "cpu"), want, EXACT)


# A rank's positions before some position: it has fewer rows than keys.
@pytest.mark.parametrize(("calls", "ranges"), [(1, None), (10, [(0, 300)])])
def test_plain_causal_rows_are_one_call(
    calls: int, ranges: list[tuple[int, int]] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, called = cpu._flash, []
    monkeypatch.setattr(cpu, "_flash", lambda *tensors, **how: called.append(how) or kernel(*tensors, **how))
    problem = FORMS["next token"]._replace(documents=[[400]] * 2, ranges=ranges)
    want = outputs_and_gradients(problem, torch.float64, "reference")
    assert_close(outputs_and_gradients(problem, torch.float64, "cpu"), want, EXACT)
    assert len(called) == calls


def test_spans_that_change_are_seen() -> None:
    """Check spans changed in place: what is derived from spans is not reused for their shape or tensor alone."""
    spans = TRAINING.spans()
    q, k, v, _ = TRAINING.tensors(torch.float64)
    for change in (None, [[150, 150], [300]], None):
        problem = TRAINING._replace(documents=change or TRAINING.documents)
        spans.copy_(problem.spans())
        got = block_attention(q, k, v, spans, backend="cpu")
        assert_close([got], [block_attention(q, k, v, problem.spans(), backend="reference")], EXACT)
    spans[1] = 7
    with pytest.raises(ValueError, match="make them with make_spans"):
        block_attention(q, k, v, spans, backend="cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_16_bit_errs_no_more_than_dense_attention(form: str, dtype: torch.dtype) -> None:
    want = outputs_and_gradients(FORMS[form], torch.float64, "reference")
    got = outputs_and_gradients(FORMS[form], dtype, "cpu")
    rival = dense_attention(FORMS[form], dtype, FORMS[form].mask())
    for g, r, w in zip(got, rival, want, strict=True):
        assert (g.double() - w).norm() <= 1.1 * (r.double() - w).norm()


@pytest.mark.parametrize("multiplies_bf16", [False, True])
def test_long_causal_rows_in_bf16_err_little_more_than_dense_attention(
    multiplies_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu.processor, "multiplies_bf16", lambda: multiplies_bf16)
    kernel, dtypes = cpu._flash_backward, set()
    monkeypatch.setattr(cpu, "_flash_backward", lambda *a, **how: dtypes.add(a[0].dtype) or kernel(*a, **how))
    problem = FORMS["next token"]._replace(documents=[[800]] * 2)
    want = outputs_and_gradients(problem, torch.float64, "reference")
    dtypes.clear()
    got = outputs_and_gradients(problem, torch.bfloat16, "cpu")
    rival = dense_attention(problem, torch.bfloat16, problem.mask())
    for g, r, w in zip(got, rival, want, strict=True):
        assert (g.double() - w).norm() <= 1.2 * (r.double() - w).norm()
    assert dtypes == {torch.bfloat16 if multiplies_bf16 else torch.float32}


def test_gradients_agree_with_finite_differences() -> None:
    problem = TRAINING._replace(documents=[[2, 5]], block_sizes=[3], num_noisy=2, heads=2, groups=1, head_dim=3)
    qkv = [x.requires_grad_() for x in problem.tensors(torch.float64)[:3]]
    assert torch.autograd.gradcheck(
        lambda *x: block_attention(*x, problem.spans(), num_noisy=2, scale=0.3, backend="cpu"), qkv
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_is_deterministic(dtype: torch.dtype) -> None:
    first = outputs_and_gradients(TRAINING, dtype, "cpu")
    again = outputs_and_gradients(TRAINING, dtype, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# These rows are a part of a chunk, whole chunks, and all rows.
@pytest.mark.parametrize("blind", [(33, 38), (0, 70), (96, 160), (0, 300)])
@pytest.mark.parametrize("num_noisy", [0, 1, 2])
def test_rows_that_see_nothing_are_zero(num_noisy: int, blind: tuple[int, int]) -> None:
    documents = [n for n in (blind[0], blind[1] - blind[0], 300 - blind[1]) if n]
    problem = TRAINING._replace(documents=[documents] * 2, num_noisy=num_noisy)
    spans = take_ranges(problem.whole_spans(), [(0, 300)])
    spans[:3, :, slice(*blind)] = blind[0]
    spans[3:, :, slice(*blind)] = torch.arange(*blind, dtype=torch.int32)
    check_spans(spans, num_keys=300)
    want = outputs_and_gradients(problem, torch.float64, "reference", spans)
    got = outputs_and_gradients(problem, torch.float32, "cpu", spans)
    assert_close(got, want, ROUNDED)
    for x in (*got, *want):
        assert x.isfinite().all()
        assert not x.unflatten(1, (-1, 300))[:, :, slice(*blind)].any()


@property_test
@given(problems(max_len=120).map(lambda p: p._replace(clean_stream=True, ranges=None)), st.data())
def test_ranks_share_the_work_of_one(problem: Problem, data: st.DataObject) -> None:
    """Check that the outer and the inner positions on two ranks give one process's rows, and key gradients add up."""
    spans, rows_of = problem.whole_spans(), torch.arange(problem.seq_len)
    opens = (spans[1] == rows_of).all(0).nonzero()[:, 0].tolist()
    first, last = sorted(data.draw(st.tuples(*[st.sampled_from([*opens, problem.seq_len])] * 2)))
    whole = outputs_and_gradients(problem, torch.float64, "cpu")
    grads_kv = [torch.zeros_like(x) for x in whole[2:]]
    for ranges in ([(0, first), (last, problem.seq_len)], [(first, last)]):
        ranges = [(a, b) for a, b in ranges if a < b]
        if not ranges:
            continue
        rows = torch.cat([rows_of[a:b] for a, b in ranges])
        q_rows = torch.cat([rows + c * problem.seq_len for c in range(problem.num_noisy + problem.clean_queries)])
        noisy = [rows + c * problem.seq_len for c in range(problem.num_noisy)]
        k_rows = torch.cat([*noisy, rows_of + problem.num_noisy * problem.seq_len])
        q, k, v, grad = problem.tensors(torch.float64)
        leaves = [x.requires_grad_() for x in (q[:, q_rows], k[:, k_rows], v[:, k_rows])]
        out = block_attention(*leaves, take_ranges(spans, ranges), num_noisy=problem.num_noisy, backend="cpu")
        grad_q, *parts = torch.autograd.grad(out, leaves, grad[:, q_rows])
        assert_close([out.detach(), grad_q], [x[:, q_rows] for x in whole[:2]], EXACT)
        for total, part in zip(grads_kv, parts, strict=True):
            total.index_add_(1, k_rows, part)
    assert_close([whole[0], whole[1], *grads_kv], whole, EXACT)


@property_test
@given(problems(max_len=120))
def test_streams_of_one_call_are_calls_of_their_own(problem: Problem) -> None:
    """Check that two noisy copies and the clean rows equal separate calls whose gradients add up."""
    problem = problem._replace(num_noisy=2, clean_queries=True, clean_stream=True, ranges=None)
    size = problem.seq_len
    whole = outputs_and_gradients(problem, torch.float64, "cpu")
    q, k, v, grad = problem.tensors(torch.float64)
    total = [torch.zeros_like(x) for x in (q, q, k, v)]
    for stream in range(3):
        rows = torch.arange(stream * size, (stream + 1) * size)
        keys = rows if stream == 2 else torch.cat([rows, torch.arange(2 * size, 3 * size)])
        leaves = [x.requires_grad_() for x in (q[:, rows], k[:, keys], v[:, keys])]
        out = block_attention(*leaves, problem.spans(), num_noisy=int(stream < 2), backend="cpu")
        parts = [out.detach(), *torch.autograd.grad(out, leaves, grad[:, rows])]
        for x, part, where in zip(total, parts, (rows, rows, keys, keys), strict=True):
            x.index_add_(1, where, part)
    assert_close(whole, total, EXACT)


def test_without_a_clean_stream_it_is_full_attention() -> None:
    problem = FORMS["no clean stream"]._replace(documents=[[300]] * 2, num_noisy=2, groups=4)
    q, k, v, _ = problem.tensors(torch.float64)
    got = block_attention(q, k, v, problem.spans(), num_noisy=2, backend="cpu")
    for copy in (slice(0, 300), slice(300, 600)):
        want = F.scaled_dot_product_attention(*(x[:, copy].transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        torch.testing.assert_close(got[:, copy], want, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("form", ["training", "large blocks", "prefill", "no clean stream"])
def test_any_strides_give_the_same(form: str) -> None:
    problem = FORMS[form]
    want = outputs_and_gradients(problem, torch.float64, "reference")
    layouts = {
        "sequence first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "part of a fused projection": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
        "head size first": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    }
    for change in layouts.values():
        q, k, v, grad = (change(x) for x in problem.tensors(torch.float32))
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = block_attention(*leaves, problem.spans(), num_noisy=problem.num_noisy, backend="cpu")
        got = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
        assert [x.stride() for x in got] == [torch.empty_like(x).stride() for x in (q, q, k, v)]
        assert_close(got, want, ROUNDED)


def test_the_gradient_of_a_sum_is_that_of_ones() -> None:
    """Check a gradient that is one number in memory, expanded to the whole shape."""
    problem = FORMS["large blocks"]
    q, k, v, grad = problem.tensors(torch.float32)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = block_attention(*leaves, problem.spans(), backend="cpu")
    of_sum = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    for a, b in zip(of_sum, torch.autograd.grad(out, leaves, torch.ones_like(grad)), strict=True):
        assert torch.equal(a, b)


def test_an_empty_micro_batch_has_empty_gradients() -> None:
    q, k, v = (torch.randn(0, 600, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    out = block_attention(q, k, v, TRAINING.spans()[:, :0], backend="cpu")
    assert out.shape == q.shape
    assert [g.shape for g in torch.autograd.grad(out.sum(), (q, k, v))] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("form", ["training", "no clean stream"])
def test_compiled_and_eager_agree(form: str) -> None:
    problem = FORMS[form]
    spans = problem.spans()

    def attend_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return 2 * block_attention(q, k, v, spans, num_noisy=problem.num_noisy, backend="cpu")

    *qkv, grad = problem.tensors(torch.float32)
    leaves = [x.requires_grad_() for x in qkv]
    results = []
    for function in (attend_twice, torch.compile(attend_twice, fullgraph=True, backend="aot_eager")):
        out = function(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_all_lengths_are_one_compiled_graph() -> None:
    """Check that other spans need no recompilation (docs/architecture.md, five ideas)."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    attend = torch.compile(lambda *x: block_attention(*x, backend="cpu"), fullgraph=True, dynamic=True, backend=graphs)
    for seq_len, block_size in ((24, 4), (40, 8), (66, 1), (90, 90)):
        problem = TRAINING._replace(documents=[[seq_len]] * 2, block_sizes=[block_size] * 2)
        q, k, v, _ = (x.requires_grad_() for x in problem.tensors(torch.float32))
        want = block_attention(q, k, v, problem.spans(), backend="cpu")
        assert torch.equal(attend(q, k, v, problem.spans()), want)
    assert graphs.frame_count == 1


def test_the_log_sum_exp_has_no_gradient() -> None:
    q, k, v, _ = (x.requires_grad_() for x in TRAINING.tensors(torch.float32))
    out, lse = torch.ops.bd3_scale.block_attention(q, k, v, TRAINING.spans(), 1, 0.3, "cpu")
    assert out.requires_grad
    assert not lse.requires_grad


@pytest.mark.parametrize("form", ["training", "two copies", "last layer", "prefill", "a rank's rows"])
def test_operators_keep_torch_s_rules(form: str) -> None:
    problem = FORMS[form]._replace(documents=[[9, 4]] if form != "a rank's rows" else [[13]], block_sizes=[2])
    if problem.ranges:
        problem = problem._replace(ranges=[(0, 4), (10, 13)])
    *qkv, grad = problem.tensors(torch.float32)
    q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in qkv)
    settings_ = (problem.spans(), problem.num_noisy, 0.3, "cpu")
    operators = torch.ops.bd3_scale
    torch.library.opcheck(operators.block_attention, (q, k, v, *settings_))
    with torch.no_grad():
        out, lse = operators.block_attention(q, k, v, *settings_)
    arguments = (grad, q.detach(), k.detach(), v.detach(), out, lse, *settings_, False)
    torch.library.opcheck(operators.block_attention_backward, arguments)
    torch.library.opcheck(operators.decode_attention, (q.detach(), k.detach(), v.detach(), None, 0.3, "cpu"))


def test_recomputed_activations_give_the_same_gradients() -> None:
    *qkv, grad = TRAINING.tensors(torch.float32)
    leaves = [x.requires_grad_() for x in qkv]
    out = checkpoint(lambda *x: block_attention(*x, TRAINING.spans(), backend="cpu"), *leaves, use_reentrant=False)
    got = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    want = outputs_and_gradients(TRAINING, torch.float32, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@property_test
@given(problems(max_len=40))
def test_flops_are_those_of_the_pairs_that_are_seen(problem: Problem) -> None:
    *qkv, grad = problem.tensors(torch.float32)
    leaves = [x.requires_grad_() for x in qkv]
    pairs = int(definition(problem).sum()) * problem.heads
    with FlopCounterMode(display=False) as forward:
        out = block_attention(*leaves, problem.spans(), num_noisy=problem.num_noisy, backend="cpu")
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(out, leaves, grad)
    assert forward.get_total_flops() == 4 * problem.head_dim * pairs
    assert backward.get_total_flops() == 10 * problem.head_dim * pairs
