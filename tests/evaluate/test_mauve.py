"""Compare MAUVE with closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.evaluate.mauve import area_under_divergence_curve, human_texts, mauve

BYTES = load_tokenizer("bytes")


def test_the_area_in_closed_form():
    p, q = np.array([0.5, 0.5, 0, 0]), np.array([0, 0, 0.3, 0.7])
    assert area_under_divergence_curve(p, p) == pytest.approx(1)
    # Disjoint: the curve is (s^5, (1 - s)^5), under which lies 5 B(6, 5); the trapezoids lie a little above.
    assert area_under_divergence_curve(p, q) == pytest.approx(1 / 252, rel=0.04)
    near, far = np.array([0.6, 0.4]), np.array([0.4, 0.6])
    assert area_under_divergence_curve(near, far) == pytest.approx(area_under_divergence_curve(far, near))


def test_nearer_laws_have_more():
    draw = np.random.default_rng(0).normal
    human = draw(size=(400, 12))
    found = [mauve(human, draw(size=(400, 12)) + shift, seed=1) for shift in (0, 0.5, 1, 3)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.9
    assert found[-1] < 0.02
    assert mauve(human, human, seed=1) == pytest.approx(1)


def test_pieces_are_evenly_over_the_documents(tmp_path):
    source = tmp_path / "human.jsonl"
    source.write_text("".join(f'{{"text": "{digit * 10}"}}\n' for digit in "0123456789"))
    assert human_texts(source, BYTES, count=5, length=4) == ["0000", "2222", "4444", "6666", "8888"]
    with pytest.raises(ValueError, match="has 20 pieces of 4 tokens, and MAUVE compares 21 samples"):
        human_texts(source, BYTES, count=21, length=4)


def test_a_few_texts_tell_nothing():
    with pytest.raises(ValueError, match="MAUVE of 19 texts says nothing: take at least 20"):
        mauve(np.ones((19, 3)), np.ones((50, 3)), seed=0)
