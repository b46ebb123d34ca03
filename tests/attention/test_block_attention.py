"""CPU path and reference against each other, against PyTorch's own attention, and against finite differences."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bd3_scale.attention.dispatch import QKV, block_attention, decode_attention
from bd3_scale.attention.reference import dense_masks
from bd3_scale.attention.spans import make_spans

BATCH, SEQ_LEN, HEADS, GROUPS, HEAD_DIM = 2, 300, 4, 2, 16


def packed(lengths: list[int]) -> Tensor:
    starts = torch.tensor([sum(lengths[:i]) for i in range(len(lengths))])
    return starts.repeat_interleave(torch.tensor(lengths))


PACKINGS = {
    "one document": torch.zeros(BATCH, SEQ_LEN, dtype=torch.int64),
    "documents cut alike": torch.stack([packed([150, 150])] * BATCH),
    "ragged, each its own": torch.stack([packed([7, 190, 3, 100]), packed([201, 99])]),
}
# noisy, clean, queries of clean
FORMS = {
    "train": (True, True, True),
    "last layer": (True, True, False),
    "prefill": (False, True, True),
    "mdlm": (True, False, False),
}


def streams(form: str, dtype: torch.dtype, seed: int = 0, heads: int = HEADS) -> tuple[QKV | None, QKV | None]:
    generator = torch.Generator().manual_seed(seed)
    has_noisy, has_clean, has_clean_queries = FORMS[form]

    def draw(num_heads: int) -> Tensor:
        # Rounded to bfloat16, so that every precision is given the same numbers.
        x = torch.randn(BATCH, SEQ_LEN, num_heads, HEAD_DIM, generator=generator)
        return x.bfloat16().to(dtype).requires_grad_()

    full = [QKV(draw(heads), draw(GROUPS), draw(GROUPS)) for _ in range(2)]
    clean = full[1] if has_clean_queries else full[1]._replace(q=None)
    return full[0] if has_noisy else None, clean if has_clean else None


def outputs_and_grads(form: str, spans: Tensor, dtype: torch.dtype, backend: str, heads: int = HEADS) -> list[Tensor]:
    noisy, clean = streams(form, dtype, heads=heads)
    outputs = [x for x in block_attention(noisy, clean, spans, backend=backend) if x is not None]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).bfloat16().to(dtype) for x in outputs]
    leaves = [x for stream in (noisy, clean) if stream is not None for x in stream if x is not None]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


def error(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want).norm())


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(
    ("form", "block_size"),
    [(form, size) for form in ("train", "last layer", "prefill") for size in (1, 8, 96, SEQ_LEN)] + [("mdlm", SEQ_LEN)],
)
def test_cpu_agrees_with_the_fp64_reference(packing: str, form: str, block_size: int) -> None:
    spans = make_spans(PACKINGS[packing], block_size)
    want = outputs_and_grads(form, spans, torch.float64, "reference")
    got = outputs_and_grads(form, spans, torch.float32, "cpu")
    for g, w in zip(got, want, strict=True):
        assert error(g, w) <= 1e-6 * w.norm()


def dense_sdpa(noisy: QKV, clean: QKV, spans: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's attention over noisy ⊕ clean with the whole 2L × 2L mask and repeated key heads."""
    noisy_to_clean, noisy_to_noisy, clean_to_clean = dense_masks(spans)
    mask = torch.cat(
        [
            torch.cat([noisy_to_noisy, noisy_to_clean], 2),
            torch.cat([torch.zeros_like(clean_to_clean), clean_to_clean], 2),
        ],
        1,
    )[:, None]
    q, k, v = (torch.cat(pair, 1).transpose(1, 2) for pair in zip(noisy, clean, strict=True))
    repeats = q.shape[1] // k.shape[1]
    out = F.scaled_dot_product_attention(
        q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1), attn_mask=mask
    )
    return tuple(out.transpose(1, 2).chunk(2, 1))


def test_reference_is_dense_attention() -> None:
    noisy, clean = streams("train", torch.float64)
    spans = make_spans(PACKINGS["ragged, each its own"], 8)
    for got, want in zip(
        block_attention(noisy, clean, spans, backend="reference"), dense_sdpa(noisy, clean, spans), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block_size", [1, 16])
def test_bfloat16_errs_no_more_than_pytorch_does(block_size: int) -> None:
    spans = make_spans(PACKINGS["ragged, each its own"], block_size)
    want = outputs_and_grads("train", spans, torch.float64, "reference")
    got = outputs_and_grads("train", spans, torch.bfloat16, "cpu")
    noisy, clean = streams("train", torch.bfloat16)
    outputs = dense_sdpa(noisy, clean, spans)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).bfloat16() for x in outputs]
    rival = [*outputs, *torch.autograd.grad(outputs, [*noisy, *clean], upstream)]
    for g, r, w in zip(got, rival, want, strict=True):
        assert error(g, w) < 1.1 * error(r, w)


def test_gradients_agree_with_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    spans = make_spans(packed([5, 8])[None], 4)
    tensors = [
        torch.randn(1, 13, heads, 4, dtype=torch.float64, generator=generator).requires_grad_()
        for heads in (2, 1, 1, 2, 1, 1)
    ]
    assert torch.autograd.gradcheck(
        lambda *x: block_attention(QKV(*x[:3]), QKV(*x[3:]), spans, scale=0.3, backend="cpu"), tensors
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_is_deterministic(dtype: torch.dtype) -> None:
    spans = make_spans(PACKINGS["ragged, each its own"], 8)
    first = outputs_and_grads("train", spans, dtype, "cpu")
    again = outputs_and_grads("train", spans, dtype, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_what_the_mask_hides_cannot_matter() -> None:
    spans = make_spans(PACKINGS["ragged, each its own"], 8)
    noisy, clean = streams("train", torch.float32)
    before = block_attention(noisy, clean, spans, backend="cpu")[0]
    changed = clean.k.detach().clone()
    changed[:, 201:] += 100.0
    after = block_attention(noisy, clean._replace(k=changed), spans, backend="cpu")[0]
    # Sequence 0: a document starts at 200 and its first block ends at 208. Sequence 1: a document starts at 201.
    torch.testing.assert_close(before[1, :201], after[1, :201], rtol=0, atol=1e-6)
    torch.testing.assert_close(before[0, :208], after[0, :208], rtol=0, atol=1e-6)
    assert not torch.allclose(before[0, 210:], after[0, 210:], atol=1e-2)


def test_decoding_a_block_equals_the_clean_stream() -> None:
    block_size = 20
    spans = make_spans(torch.zeros(BATCH, SEQ_LEN, dtype=torch.int64), block_size)
    _, clean = streams("prefill", torch.float64)
    want = block_attention(None, clean, spans, backend="reference")[1]
    block = slice(120, 140)
    got = decode_attention(clean.q[:, block], clean.k[:, : block.stop], clean.v[:, : block.stop])
    torch.testing.assert_close(got, want[:, block], rtol=1e-12, atol=1e-12)


def test_decoding_ignores_masked_padding_of_shorter_prefixes() -> None:
    _, clean = streams("prefill", torch.float64)
    q, k, v = clean.q[:, :5], clean.k, clean.v
    key_mask = torch.ones(BATCH, SEQ_LEN, dtype=torch.bool)
    key_mask[1, 100:200] = False
    got = decode_attention(q, k, v, key_mask=key_mask)
    torch.testing.assert_close(got[:1], decode_attention(q[:1], k[:1], v[:1]))
    kept = key_mask[1]
    torch.testing.assert_close(got[1:], decode_attention(q[1:], k[1:, kept], v[1:, kept]))


def test_auto_is_the_cpu_path_without_a_warning() -> None:
    noisy, clean = streams("train", torch.float32)
    spans = make_spans(PACKINGS["one document"], 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = block_attention(noisy, clean, spans)
    assert torch.equal(got[0], block_attention(noisy, clean, spans, backend="cpu")[0])


def test_misfits_are_refused_by_name() -> None:
    noisy, clean = streams("train", torch.float32)
    spans = make_spans(PACKINGS["one document"], 8)
    for message, arguments in {
        r"noisy\.q is None": (noisy._replace(q=None), clean, spans),
        "neither noisy nor clean": (None, clean._replace(q=None), spans),
        r"clean\.v has shape": (noisy, clean._replace(v=clean.v[:, :-1]), spans),
        r"noisy\.q has shape": (noisy._replace(q=noisy.q[:, :, :3]), clean, spans),
        r"clean\.k is torch\.float64": (noisy, clean._replace(k=clean.k.double()), spans),
        r"noisy\.q has shape \(2, 300, 4\)": (noisy._replace(q=noisy.q[..., 0]), clean, spans),
        "spans has shape": (noisy, clean, spans[:, :, :-1]),
    }.items():
        with pytest.raises(ValueError, match=message):
            block_attention(*arguments)
