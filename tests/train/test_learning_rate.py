"""Check schedules at the points where their values are known."""

from __future__ import annotations

import pytest

from bd3_scale.recipe.schema import OptimizerRecipe
from bd3_scale.train.step import learning_rate


def rates(steps=100, **options):
    optimizer = OptimizerRecipe(lr=1.0, min_lr_ratio=0.1, **options)
    return [learning_rate(step, steps, optimizer) for step in range(steps)]


def test_warm_up_is_linear_and_ends_at_the_peak():
    assert rates(warmup_steps=10)[:10] == pytest.approx([0.1 * i for i in range(1, 11)])


def test_cosine_passes_its_middle_half_way():
    cosine = rates(schedule="cosine", warmup_steps=20)
    assert cosine[20] == 1.0
    assert cosine[60] == pytest.approx(0.55)
    assert 0.1 < cosine[-1] < 0.102


def test_wsd_is_flat_and_then_straight():
    wsd = rates(schedule="wsd", warmup_steps=5, decay_steps=40)
    assert set(wsd[5:61]) == {1.0}
    assert wsd[80] == pytest.approx(0.1 + 0.9 / 2)
    assert wsd[99] == pytest.approx(0.1 + 0.9 / 40)


def test_wsd_decays_over_a_fifth_by_default():
    assert rates(schedule="wsd") == rates(schedule="wsd", decay_steps=20)


def test_constant():
    assert set(rates(schedule="constant")) == {1.0}
