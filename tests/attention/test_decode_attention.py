"""Compare decoding on CPU with the float64 reference and with the clean stream."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_scale.attention.dispatch import block_attention, decode_attention
from bd3_scale.attention.spans import make_spans
from tests.attention.cases import assert_close


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 20), st.integers(1, 150), st.sampled_from([(1, 1), (4, 2), (6, 1)]))
def test_decoding_is_the_reference(
    data: st.DataObject, num_queries: int, num_keys: int, heads: tuple[int, int]
) -> None:
    lengths = data.draw(st.none() | st.lists(st.integers(0, num_keys), min_size=1, max_size=3))
    batch = 2 if lengths is None else len(lengths)
    generator = torch.Generator().manual_seed(num_keys)
    q = torch.randn(batch, num_queries, heads[0], 16, generator=generator)
    k, v = torch.randn(2, batch, num_keys, heads[1], 16, generator=generator)
    seen = None if lengths is None else torch.tensor(lengths)
    got = decode_attention(q, k, v, lengths=seen, backend="cpu")
    assert_close([got], [decode_attention(q.double(), k.double(), v.double(), lengths=seen, backend="reference")], 2e-6)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("lengths", [(300, 300), (170, 170), (40, 200), (0, 1), (0, 0), (500, 300)])
def test_decoding_sees_no_key_beyond_its_length(lengths: tuple[int, int], backend: str) -> None:
    q, k, v = (torch.randn(2, rows, heads, 16, dtype=torch.float64) for rows, heads in ((5, 4), (300, 2), (300, 2)))
    for one, length in enumerate(lengths):
        k[one, length:], v[one, length:] = torch.nan, torch.nan
    got = decode_attention(q, k, v, lengths=torch.tensor(lengths), backend=backend)
    for one, length in enumerate(lengths):
        if length == 0:
            assert not got[one].any()
            continue
        want = decode_attention(q[[one]], k[[one], :length], v[[one], :length], backend=backend)
        torch.testing.assert_close(got[[one]], want, rtol=1e-12, atol=1e-12)


def test_decoding_a_block_equals_the_clean_stream() -> None:
    spans = make_spans(torch.zeros(2, 300, dtype=torch.int64), 20)
    q, k, v = (torch.randn(2, 300, heads, 16, dtype=torch.float64) for heads in (4, 2, 2))
    want = block_attention(q, k, v, spans, num_noisy=0, backend="reference")
    block = slice(120, 140)
    got = decode_attention(q[:, block], k[:, : block.stop], v[:, : block.stop])
    torch.testing.assert_close(got, want[:, block], rtol=1e-12, atol=1e-12)


def test_a_cache_may_lie_in_any_order() -> None:
    q, k, v = (torch.randn(2, rows, heads, 16) for rows, heads in ((5, 4), (300, 2), (300, 2)))
    want = decode_attention(q, k, v)
    for first, second in ((0, 1), (1, 2), (1, 3)):
        layout = [x.transpose(first, second).contiguous().transpose(first, second) for x in (q, k, v)]
        torch.testing.assert_close(decode_attention(*layout), want)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_nothing_to_decode_is_nothing(shape: tuple[int, int]) -> None:
    q, k = torch.randn(*shape, 4, 16), torch.randn(shape[0], 7, 2, 16)
    assert decode_attention(q, k, k).shape == q.shape
