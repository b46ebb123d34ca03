from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bd3_scale.recipe.vocabulary import Vocabulary


@given(st.integers(2, 300_000))
def test_padding_is_the_least_multiple_of_128_that_holds_every_id(size: int) -> None:
    padded = Vocabulary(size=size, eos_id=0, mask_id=size - 1).padded_size
    assert padded % 128 == 0
    assert size <= padded < size + 128


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"size": 258, "eos_id": 256, "mask_id": 258}, "mask_id=258.*258 ids"),
        ({"size": 258, "eos_id": 300, "mask_id": 257}, "eos_id=300"),
        ({"size": 258, "eos_id": 257, "mask_id": 257}, "both 257"),
        ({"size": 258, "eos_id": -1, "mask_id": 257}, "eos_id"),
        ({"size": "258", "eos_id": 256, "mask_id": 257}, "size"),
    ],
)
def test_impossible_ids_are_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Vocabulary.model_validate(values)
