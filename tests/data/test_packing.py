from __future__ import annotations

from random import Random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bd3_scale.data.packing import PackedSequence, Packer

EOS = 99


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[int]], int, int]:
    multiple = draw(st.integers(1, 5))
    seq_len = multiple * draw(st.integers(1, 6))
    # EOS inside a text cannot happen, so documents are without it and their ends can be found again.
    documents = draw(st.lists(st.lists(st.integers(0, 98), min_size=1, max_size=40), max_size=12))
    return documents, seq_len, multiple


def pack(documents: list[list[int]], seq_len: int, multiple: int) -> tuple[list[PackedSequence], int]:
    packer = Packer(seq_len, multiple, EOS, np.uint16)
    complete = [sequence for document in documents for sequence in packer.add(document)]
    return complete + list(packer.fill()), packer.num_pending


@given(cases())
def test_documents_can_be_rebuilt_from_the_sequences(case: tuple[list[list[int]], int, int]) -> None:
    documents, seq_len, multiple = case
    sequences, pending = pack(documents, seq_len, multiple)
    assert pending == 0
    rebuilt: list[list[int]] = [[]]
    padding = 0
    for sequence in sequences:
        assert sequence.tokens.dtype == np.uint16
        assert sequence.tokens.shape == (seq_len,)
        assert sequence.document_lengths.sum() == seq_len
        assert len(sequence.document_lengths) == len(sequence.counted_lengths)
        start = 0
        for length, counted in zip(sequence.document_lengths, sequence.counted_lengths, strict=True):
            assert length % multiple == 0
            piece = sequence.tokens[start : start + length].tolist()
            assert set(piece[counted:]) <= {EOS}
            rebuilt[-1] += piece[:counted]
            padding += length - counted
            if counted and piece[counted - 1] == EOS:
                rebuilt.append([])
            start += length
    assert rebuilt == [*([*document, EOS] for document in documents), []]
    padded = sum(-(-(len(document) + 1) // multiple) * multiple for document in documents)
    assert len(sequences) == -(-padded // seq_len)
    assert padding == len(sequences) * seq_len - sum(len(document) + 1 for document in documents)


@given(cases())
def test_pieces_end_only_with_their_document_or_sequence(case: tuple[list[list[int]], int, int]) -> None:
    documents, seq_len, multiple = case
    packer = Packer(seq_len, multiple, EOS, np.uint16)
    expected_end = 0
    ends = {0}
    for document in documents:
        expected_end += -(-(len(document) + 1) // multiple) * multiple
        ends.add(expected_end)
        list(packer.add(document))
        assert packer.num_pending == expected_end % seq_len
    sequences, _ = pack(documents, seq_len, multiple)
    for number, sequence in enumerate(sequences):
        cuts = number * seq_len + np.cumsum(sequence.document_lengths)
        assert all(cut in ends or cut % seq_len == 0 for cut in cuts.tolist())


def test_an_exact_fit_leaves_nothing_to_fill() -> None:
    sequences, _ = pack([[1, 2, 3], [4, 5, 6, 7]], 4, 4)
    assert [sequence.tokens.tolist() for sequence in sequences] == [[1, 2, 3, EOS], [4, 5, 6, 7], [EOS] * 4]
    assert [sequence.counted_lengths.tolist() for sequence in sequences] == [[4], [4], [1]]


@given(cases(), st.randoms(use_true_random=False))
def test_runs_that_are_shown_stay_with_their_tokens_where_a_document_is_cut(
    case: tuple[list[list[int]], int, int], random: Random
) -> None:
    documents, seq_len, multiple = case
    packer = Packer(seq_len, multiple, EOS, np.uint16)
    sequences, shown, counted = [], [], []
    for document in documents:
        flags = [random.random() < 0.4 for _ in document]
        trains_end = random.random() < 0.5
        places = [place for place, flag in enumerate(flags) if flag]
        runs = [(place, place + 1) for place in places]
        sequences += packer.add(document, runs, trains_end=trains_end)
        padding = -(len(document) + 1) % multiple
        shown += [*flags, *[not trains_end] * (1 + padding)]
        counted += [*(not flag for flag in flags), trains_end, *[False] * padding]
    sequences += packer.fill()
    filled = len(sequences) * seq_len - len(shown)
    shown, counted = [*shown, *[False] * filled], [*counted, *[False] * filled]
    found = np.zeros(len(shown), np.bool_)
    for number, sequence in enumerate(sequences):
        assert sequence.shown.dtype == np.int32
        for first, last in sequence.shown:
            assert 0 <= first < last <= seq_len or (first, last) == (0, 0)
            found[number * seq_len + first : number * seq_len + last] = True
        own = slice(number * seq_len, (number + 1) * seq_len)
        assert sequence.num_shown == sum(shown[own])
        assert sequence.num_counted == sum(counted[own])
    assert found.tolist() == shown
