"""Compare spans with the mask's definition, counted pair by pair."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bd3_scale.attention.reference import dense_masks
from bd3_scale.attention.spans import check_spans, count_pairs, make_spans, take_ranges, zigzag_ranges

packings = st.lists(st.integers(1, 9), min_size=1, max_size=5)


def document_start(lengths: list[int]) -> torch.Tensor:
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return torch.tensor([s for s, n in zip(starts, lengths, strict=True) for _ in range(n)])[None]


@given(packings, st.integers(1, 12))
def test_masks_from_spans_are_the_definition(lengths: list[int], block_size: int) -> None:
    spans = make_spans(document_start(lengths), block_size)
    noisy_to_clean, noisy_to_noisy, clean_to_clean = dense_masks(spans, num_keys=spans.shape[2])
    place = [(document, offset // block_size) for document, n in enumerate(lengths) for offset in range(n)]
    for query, (document, block) in enumerate(place):
        for key, (other_document, other_block) in enumerate(place):
            together = document == other_document
            assert noisy_to_clean[0, query, key] == (together and other_block < block)
            assert noisy_to_noisy[0, query, key] == (together and other_block == block)
            assert clean_to_clean[0, query, key] == (together and other_block <= block)


def test_sequences_of_a_batch_keep_their_own_documents() -> None:
    spans = make_spans(torch.cat([document_start([3, 5]), document_start([8])]), 4)
    assert spans.dtype == torch.int32
    assert spans[:, 0].tolist() == [[0, 0, 0, 3, 3, 3, 3, 3], [0, 0, 0, 3, 3, 3, 3, 7], [3, 3, 3, 7, 7, 7, 7, 8]]
    assert spans[:, 1].tolist() == [[0] * 8, [0, 0, 0, 0, 4, 4, 4, 4], [4, 4, 4, 4, 8, 8, 8, 8]]


@given(packings, st.integers(1, 12), st.data())
def test_check_spans_catches_every_single_altered_integer(
    lengths: list[int], block_size: int, data: st.DataObject
) -> None:
    spans = make_spans(document_start(lengths), block_size)
    row = data.draw(st.integers(0, 2))
    position = data.draw(st.integers(0, spans.shape[2] - 1))
    altered = spans.clone()
    altered[row, 0, position] += data.draw(st.integers(-20, 20).filter(bool))
    check_spans(spans)
    if not describes_blocks(altered):
        with pytest.raises(ValueError, match="make_spans"):
            check_spans(altered)


def describes_blocks(spans: torch.Tensor) -> bool:
    """Return whether spans describe valid blocks. It walks block by block, since an altered integer can leave another
    valid division into documents and blocks."""
    doc_start, block_start, block_end = spans[:, 0].tolist()
    position = 0
    while position < len(doc_start):
        end = block_end[position]
        if not position < end <= len(doc_start) or not 0 <= doc_start[position] <= position:
            return False
        if position == 0 and doc_start[0] != 0:
            return False
        if doc_start[position] not in (position, doc_start[position - 1]):
            return False
        if any(
            (doc_start[i], block_start[i], block_end[i]) != (doc_start[position], position, end)
            for i in range(position, end)
        ):
            return False
        position = end
    return True


@pytest.mark.parametrize(
    ("starts", "block_size", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), 2, r"shape \(4,\)"),
        (torch.zeros(1, 4), 2, "torch.float32"),
        (torch.zeros(1, 4, dtype=torch.int64), 0, "block_size is 0"),
        (torch.tensor([[0, 0, 2, 0]]), 2, "sequence 0 at position"),
        (torch.tensor([[0, 0, 1, 1]]), 2, "sequence 0 at position"),
        (torch.tensor([[1, 1, 2, 2]]), 2, "sequence 0 at position 0"),
    ],
)
def test_wrong_documents_are_refused(starts: torch.Tensor, block_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_spans(starts, block_size)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.integers(0, 2))
def test_context_ranks_share_out_all_positions_and_as_many_pairs(
    size: int, blocks: int, block_size: int, num_noisy: int
) -> None:
    """Check ranges of whole blocks of one document; the rank with the first rows has the last ones, too."""
    length = 2 * size * blocks * block_size
    ranks = [zigzag_ranges(length, rank, size) for rank in range(size)]
    assert sorted(i for ranges in ranks for start, end in ranges for i in range(start, end)) == list(range(length))
    spans = make_spans(document_start([length]), block_size)
    for clean_queries in {True, num_noisy == 0}:
        pairs = [
            count_pairs(take_ranges(spans, ranges), num_noisy=num_noisy, clean_queries=clean_queries)
            for ranges in ranks
        ]
        assert set(pairs) == {count_pairs(spans, num_noisy=num_noisy, clean_queries=clean_queries) / size}


@given(packings, st.integers(1, 12), st.integers(0, 2), st.booleans())
def test_pairs_are_those_of_the_masks(lengths: list[int], block_size: int, num_noisy: int, clean_queries: bool) -> None:
    spans = make_spans(document_start(lengths), block_size)
    noisy_to_clean, noisy_to_noisy, clean_to_clean = dense_masks(spans, num_keys=spans.shape[2])
    expected = num_noisy * (noisy_to_clean.sum() + noisy_to_noisy.sum()) + clean_queries * clean_to_clean.sum()
    assert count_pairs(spans, num_noisy=num_noisy, clean_queries=clean_queries) == expected


def test_a_sequence_that_does_not_divide_over_the_context_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="seq_len 18 does not divide into 2 ranges for each of 4 ranks"):
        zigzag_ranges(18, 1, 4)


@given(packings, st.integers(1, 12), st.data())
def test_rows_without_own_keys_see_clean_ones_alone_and_may_be_cut_anywhere(
    lengths: list[int], block_size: int, data: st.DataObject
) -> None:
    spans = make_spans(document_start(lengths), block_size)
    length = spans.shape[2]
    cuts = data.draw(st.lists(st.integers(0, length), min_size=2, max_size=5, unique=True).map(sorted))
    ranges = list(zip(cuts[::2], cuts[1::2], strict=False))
    taken = take_ranges(spans, ranges, own_keys=False)
    places = [i for start, end in ranges for i in range(start, end)]
    check_spans(taken, num_keys=length)
    assert taken.dtype == torch.int32
    assert torch.equal(taken[:3], spans[:, :, places])
    noisy_to_clean, noisy_to_noisy, clean_to_clean = dense_masks(taken, num_keys=length)
    assert not noisy_to_noisy.any()
    assert torch.equal(clean_to_clean, dense_masks(spans, num_keys=length)[2][:, places])
    assert torch.equal(noisy_to_clean, dense_masks(spans, num_keys=length)[0][:, places])
    if any(spans[1, 0, start] != start or spans[2, 0, end - 1] != end for start, end in ranges):
        with pytest.raises(ValueError, match="cuts a block"):
            take_ranges(spans, ranges)
