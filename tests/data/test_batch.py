from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bd3_scale.data.batch import Batch, collate


@st.composite
def sample(draw: st.DrawFn, seq_len: int = 12) -> dict[str, np.ndarray]:
    cuts = sorted(draw(st.sets(st.integers(1, seq_len - 1))))
    lengths = np.diff([0, *cuts, seq_len])
    counted = [draw(st.integers(0, int(length))) for length in lengths]
    ends = sorted(draw(st.sets(st.integers(0, seq_len), max_size=6)))
    shown = np.array(ends[: len(ends) // 2 * 2], np.int32).reshape(-1, 2)
    column = {} if draw(st.booleans()) and not len(shown) else {"shown": shown}
    return column | {
        "tokens": np.arange(seq_len, dtype=np.uint16),
        "document_lengths": lengths.astype(np.int32),
        "counted_lengths": np.array(counted, np.int32),
    }


def make(samples: list[dict[str, np.ndarray]], isolate_documents: bool) -> Batch:
    ids = np.arange(100, 100 + len(samples))
    return collate(samples, ids, ids - 100, isolate_documents, epochs=ids % 2)


@given(st.lists(sample(), min_size=1, max_size=4), st.booleans())
def test_agrees_with_a_walk_over_the_pieces(samples: list[dict[str, np.ndarray]], isolate_documents: bool) -> None:
    batch = make(samples, isolate_documents)
    for row, one in enumerate(samples):
        at = 0
        for length, counted in zip(one["document_lengths"], one["counted_lengths"], strict=True):
            for within in range(length):
                assert batch.document_start[row, at] == (at - within if isolate_documents else 0)
                assert batch.positions[row, at] == (within if isolate_documents else at)
                is_shown = any(first <= at < last for first, last in one.get("shown", ()))
                assert batch.shown[row, at] == is_shown
                assert batch.counted[row, at] == (within < counted and not is_shown)
                assert batch.padding[row, at] == (within >= counted and not is_shown)
                assert batch.tokens[row, at] == at
                at += 1
    dtypes = {name: value.dtype for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    assert dtypes == {
        "ids": torch.int64,
        "slots": torch.int64,
        "epochs": torch.int64,
        "source_keys": torch.int64,
        "tokens": torch.int64,
        "document_start": torch.int32,
        "positions": torch.int64,
        "counted": torch.bool,
        "shown": torch.bool,
    }


@given(st.integers(0, 40).flatmap(lambda n: st.lists(sample(n + 2), min_size=1, max_size=3)), st.booleans())
def test_bytes_hold_all_of_it(samples: list[dict[str, np.ndarray]], isolate_documents: bool) -> None:
    batch = make(samples, isolate_documents)
    content = batch.to_bytes()
    sequences, seq_len = batch.tokens.shape
    assert (content.dtype, content.shape) == (np.uint8, (sequences * (32 + 22 * seq_len),))
    found = Batch.from_bytes(content, sequences, seq_len)
    content[:] = 0  # they are copies: the next batch may come into the same memory
    assert vars(found).keys() == vars(batch).keys()
    for name, value in vars(batch).items():
        assert vars(found)[name].dtype == value.dtype, name
        assert torch.equal(vars(found)[name], value), name
    with pytest.raises(ValueError, match="must be"):
        Batch.from_bytes(content[1:], sequences, seq_len)


def test_split_keeps_order_and_identity() -> None:
    one = {"tokens": np.zeros(4, np.uint16), "document_lengths": np.array([4], np.int32)}
    batch = make([one | {"counted_lengths": np.array([n], np.int32)} for n in range(5)], True)
    parts = batch.split(2)
    assert [part.ids.tolist() for part in parts] == [[100, 101], [102, 103], [104]]
    assert [part.slots.tolist() for part in parts] == [[0, 1], [2, 3], [4]]
    assert [part.epochs.tolist() for part in parts] == [[0, 1], [0, 1], [0]]
    assert [part.source_keys.tolist() for part in parts] == [[0, 0], [0, 0], [0]]
    assert torch.cat([part.counted for part in parts]).sum(1).tolist() == [0, 1, 2, 3, 4]
