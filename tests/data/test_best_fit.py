from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bd3_scale.data import packing
from bd3_scale.data.packing import BestFitPacker, PackedSequence, best_fit

EOS = 9999
LONGEST = 40


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[int]], int, int]:
    multiple = draw(st.integers(1, 5))
    seq_len = multiple * draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(1, LONGEST), max_size=25))
    # No token is there twice, so that each tells where it is from.
    return [[number * LONGEST + i for i in range(n)] for number, n in enumerate(lengths)], seq_len, multiple


def pack(documents: list[list[int]], seq_len: int, multiple: int, **how: bool) -> list[PackedSequence]:
    packer = BestFitPacker(seq_len, multiple, EOS, np.uint16, **how)
    found = [sequence for document in documents for sequence in packer.add(document)]
    found += packer.fill()
    assert packer.num_pending == 0
    return found


def pieces(sequence: PackedSequence) -> list[list[int]]:
    """Return the counted tokens of each piece."""
    starts = np.cumsum(sequence.document_lengths) - sequence.document_lengths
    return [
        sequence.tokens[start : start + counted].tolist()
        for start, counted in zip(starts, sequence.counted_lengths, strict=True)
    ]


@given(cases(), st.booleans())
def test_every_token_is_there_once_and_no_document_is_cut_that_fits(
    case: tuple[list[list[int]], int, int], shows: bool
) -> None:
    documents, seq_len, multiple = case
    found: dict[int, list[list[int]]] = {number: [] for number in range(len(documents))}
    ends = 0
    for sequence in pack(documents, seq_len, multiple, shows_filling=shows):
        assert sequence.tokens.shape == (seq_len,)
        assert sequence.document_lengths.sum() == seq_len
        assert (sequence.document_lengths % multiple == 0).all()
        texts = pieces(sequence)
        filling = seq_len - sum(-(-len(text) // multiple) * multiple for text in texts)
        assert [not text for text in texts] == [False] * (len(texts) - bool(filling)) + [True] * bool(filling)
        assert sequence.num_shown == (filling if shows else 0)
        assert Counter(sequence.tokens.tolist())[EOS] == seq_len - sum(len([i for i in t if i != EOS]) for t in texts)
        for text in texts[: len(texts) - bool(filling)]:
            ends += text[-1] == EOS
            owner = text[0] // LONGEST if text[0] != EOS else None
            found.setdefault(-1 if owner is None else owner, []).append([i for i in text if i != EOS])
    assert ends == len(documents)
    for number, document in enumerate(documents):
        parts = sorted(found[number])
        assert list(chain(*parts)) == document
        assert len(parts) == -(-len(document) // seq_len)
        assert all(len(part) == seq_len for part in parts[:-1])


@given(st.integers(1, 60).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=60))))
def test_it_is_best_fit_decreasing(case: tuple[int, list[int]]) -> None:
    capacity, sizes = case
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append(min(fitting, default=capacity) - size)
    found = best_fit(sizes, capacity)
    assert sorted(capacity - sum(sizes[item] for item in items) for items in found) == sorted(rooms)
    assert sorted(chain(*found)) == list(range(len(sizes)))
    assert found == sorted(found)
    assert all(items == sorted(items) for items in found)


@given(cases(), st.integers(1, 9))
def test_runs_are_packed_on_their_own(case: tuple[list[list[int]], int, int], most: int) -> None:
    """Check that the packing of a run depends on its documents alone."""
    documents, seq_len, multiple = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "RUN_PIECES", most)
        found = pack(documents, seq_len, multiple)
        runs, count = [[]], 0
        for document in documents:
            runs[-1].append(document)
            count += -(-(-(-(len(document) + 1) // multiple) * multiple) // seq_len)
            if count >= most:
                runs, count = [*runs, []], 0
    alone = [sequence for run in runs for sequence in pack(run, seq_len, multiple)]
    assert [vars(s).keys() for s in found] == [vars(s).keys() for s in alone]
    for one, other in zip(found, alone, strict=True):
        assert all(np.array_equal(getattr(one, name), getattr(other, name)) for name in vars(one))


def test_a_run_is_bounded_in_tokens_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "RUN_TOKENS", 64)
    packer = BestFitPacker(32, 8, EOS, np.uint16)
    pending = []
    for number in range(40):
        list(packer.add([number] * 20))
        pending.append(packer.num_pending)
    assert pending[:4] == [24, 48, 0, 24]


def test_shown_runs_stay_with_their_tokens() -> None:
    packer = BestFitPacker(8, 4, EOS, np.uint16)
    assert list(packer.add(range(10), [(1, 3), (6, 9)], trains_end=False)) == []
    assert list(packer.add([20, 21], [(0, 1)])) == []
    first, second = packer.fill()
    assert (first.tokens.tolist(), first.shown.tolist()) == ([*range(8)], [[1, 3], [6, 8]])
    # The rest of the first document, of which all that ends it is shown, and the second one.
    assert second.tokens.tolist() == [8, 9, EOS, EOS, 20, 21, EOS, EOS]
    assert second.shown.tolist() == [[0, 1], [2, 4], [4, 5]]
    assert second.counted_lengths.tolist() == [3, 3]
