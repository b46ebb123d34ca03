"""Compare noise schedules with closed forms and exact enumeration, and masked shares with a truncated binomial."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from bd3_scale.diffusion.nelbo import loss_weight
from bd3_scale.diffusion.noise import draw_copies, draw_noise
from bd3_scale.diffusion.schedule import Curve, Schedule
from bd3_scale.recipe.checks import check_recipe
from bd3_scale.recipe.schema import Recipe, RecipeError
from bd3_scale.registry import schedules
from tests.support.recipes import tiny_recipe


@schedules.register("test_smoothstep")
class Smoothstep(Curve):
    """The schedule 3t² − 2t³, which the package does not have; trigonometry gives its inverse."""

    clips = is_mirrored = True

    def rate(self, level):
        return level**2 * (3 - 2 * level)

    def slope(self, level):
        return 6 * level * (1 - level)

    def level(self, rate):
        return 0.5 - np.sin(np.arcsin(1 - 2 * rate) / 3)


NAMES = schedules.names()
BLOCK = 3
TIMES = np.array([0.01, 0.1, 0.25, 0.5, 0.8, 0.999])


def integral(function, degree=200):
    """Integrate over t in (0, 1) with t = s^4: square roots have no derivative at 0, so nodes must be dense there."""
    nodes, weights = np.polynomial.legendre.leggauss(degree)
    s = (nodes + 1) / 2
    return float((weights / 2 * 4 * s**3 * function(s**4)).sum())


def pattern_nll(monotone: bool = False) -> dict[tuple[int, ...], float]:
    """Return the nll of the masked tokens for each pattern of masks: random, or growing with what is hidden."""
    generator = np.random.default_rng(0)
    base = generator.uniform(0.5, 3, BLOCK)
    return {
        pattern: sum(pattern * base) * (1 + 0.3 * sum(pattern) if monotone else generator.uniform(0.5, 2))
        for pattern in itertools.product([0, 1], repeat=BLOCK)
    }


def expected(rate, nll):
    """Return the mean nll of the masked tokens where each is masked at `rate` [N]."""
    rate = np.asarray(rate, dtype=np.float64)
    return sum(value * rate ** sum(p) * (1 - rate) ** (BLOCK - sum(p)) for p, value in nll.items())


def exact(nll):
    """Return ∫ over p of 1/p · the mean nll, by Beta functions."""
    beta = {k: math.gamma(k) * math.gamma(BLOCK - k + 1) / math.gamma(BLOCK + 1) for k in range(1, BLOCK + 1)}
    return sum(value * beta[sum(p)] for p, value in nll.items() if sum(p))


@pytest.mark.parametrize("name", NAMES)
def test_rates_run_from_zero_to_one_and_the_weight_is_their_logarithm_s_slope(name):
    schedule = Schedule(name)
    assert schedule.mask_rate(np.array([0.0, 1.0])).tolist() == [0.0, 1.0]
    step = 1e-3 * TIMES
    rates = [schedule.mask_rate(np.array(TIMES + sign * step)).astype(np.float64) for sign in (-1, 1)]
    slope = (np.log(rates[1]) - np.log(rates[0])) / (2 * step)
    # float32 rates leave about 1e-7 / 1e-3 of the difference, at t = 0.01 relative to 2 / t and less; one may be flat.
    np.testing.assert_allclose(schedule.weight(schedule.mask_rate(TIMES)), slope, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "rate", "weight"),
    [
        ("linear", 0.25, 4.0),
        ("cosine", 1 - math.sqrt(0.5), math.pi / 2 * math.sqrt(0.5) / (1 - math.sqrt(0.5))),  # t = 1/2
        ("square", 0.25, 4.0),
        ("square_root", 0.5, 2.0),
        ("log", 0.5, 1 / (math.log(2) * math.sqrt(2) * 0.5)),
    ],
)
def test_closed_forms(name, rate, weight):
    assert Schedule(name).weight(np.float32([rate])).item() == pytest.approx(weight, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_has_the_enumerated_bound(name):
    schedule, nll = Schedule(name), pattern_nll()

    def loss(t):
        rate = schedule.mask_rate(t)
        return schedule.weight(rate) * expected(rate, nll)

    assert integral(loss) == pytest.approx(exact(nll), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_drawn_masks_have_it_too(name):
    count, nll = 20_000, pattern_nll()
    starts = torch.zeros(count, BLOCK, dtype=torch.int64)
    noise = draw_noise(
        starts,
        seed=3,
        epoch=0,
        sample_ids=torch.arange(count),
        schedule=Schedule(name),
        step=0,
        slots=torch.arange(count),
        global_batch_size=count,
    )
    values = np.array([nll[tuple(row)] for row in noise.masked.int().tolist()])
    estimate = values * loss_weight(noise).amax(1).double().numpy()
    assert abs(estimate.mean() - exact(nll)) < 4 * estimate.std() / math.sqrt(count)


@pytest.mark.parametrize("name", [name for name in NAMES if schedules.get(name).clips])
@pytest.mark.parametrize(("low", "high"), [(0.3, 0.8), (0.0, 0.5), (0.55, 1.0)])
def test_a_clipped_schedule_has_its_part_of_the_bound(name, low, high):
    """Check the integral of 1/p · the mean nll over p in [low, high], by the mean over t and by the width alone."""
    schedule, nll = Schedule(name, low=low, high=high), pattern_nll()
    nodes, weights = np.polynomial.legendre.leggauss(50)
    rates = low + (high - low) * (nodes + 1) / 2
    part = float((weights / 2 * expected(rates, nll) / rates).sum())

    def loss(t):
        rate = schedule.mask_rate(t)
        return schedule.weight(rate) * expected(rate, nll)

    assert integral(loss) == pytest.approx(part, rel=1e-5)
    single = Schedule(name, low=1.0)
    assert single.weight(single.mask_rate(TIMES)).tolist() == [1.0] * len(TIMES)


@pytest.mark.parametrize("name", NAMES)
def test_finite_time_comes_down_to_the_continuous_bound(name):
    nll = pattern_nll(monotone=True)
    bounds = []
    for steps in (1, 2, 4, 16, 64, 512, 4096):
        schedule = Schedule(name, num_steps=steps)
        rates = schedule.mask_rate((np.arange(steps) + 0.5) / steps)
        bounds.append(float((schedule.weight(rates).astype(np.float64) * expected(rates, nll)).mean()))
    # One step masks all and reads every token at once.
    assert bounds[0] == pytest.approx(nll[1, 1, 1], rel=1e-6)
    assert all(before > after for before, after in itertools.pairwise(bounds))
    assert bounds[-1] > exact(nll) * (1 - 1e-6)
    assert bounds[-1] == pytest.approx(exact(nll), rel=1e-2 if name == "square_root" else 1e-3)


def test_finite_time_draws_its_steps_alone():
    noise = draw_noise(
        torch.arange(64).expand(50, -1), seed=1, epoch=0, sample_ids=torch.arange(50), schedule=Schedule(num_steps=4)
    )
    values, counts = noise.mask_rate.unique(return_counts=True)
    assert values.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert counts.tolist() == [800] * 4  # stratified


def test_unit_weights_begin_above_a_half():
    rates = np.float32([0.5, 0.6, 0.9])
    assert Schedule(low=0.55, weights="unit_when_heavy").weight(rates).tolist() == [1.0, 1.0, 1.0]
    kept = Schedule(low=0.5, weights="unit_when_heavy").weight(rates)
    assert kept.tolist() == Schedule(low=0.5).weight(rates).tolist() == (1 / rates).tolist()


@pytest.mark.parametrize(("low", "high"), [(0.3, 0.8), (0.0, 0.5), (0.45, 0.95), (0.9, 1.0), (0.0, 1.0)])
@pytest.mark.parametrize("block_size", [4, 16])
def test_the_number_of_masks_is_the_truncated_binomial(low, high, block_size):
    """Compare the numbers of masks with the sum of each block's distribution, by chi-square."""
    count, seq_len = 4000, 32
    position = torch.arange(seq_len)
    noise = draw_noise(
        (position - position % block_size).expand(count, -1),
        seed=2,
        epoch=0,
        sample_ids=torch.arange(count),
        schedule=Schedule(low=low, high=high, clip_masked_share=True),
    )
    masks = noise.masked.unflatten(1, (-1, block_size)).sum(2).flatten().numpy()
    rates = noise.mask_rate[:, ::block_size].flatten().double().numpy()
    admissible = [k for k in range(block_size + 1) if low - 1e-9 <= k / block_size <= high + 1e-9]
    each = np.array([math.comb(block_size, k) * rates**k * (1 - rates) ** (block_size - k) for k in admissible])
    law = (each / each.sum(0)).sum(1)
    seen = np.array([(masks == k).sum() for k in admissible])
    assert seen.sum() == len(masks)
    likely = law >= 5
    statistic = ((seen - law)[likely] ** 2 / law[likely]).sum()
    degrees = max(likely.sum() - 1, 1)
    assert statistic < degrees + 4 * math.sqrt(2 * degrees)
    # Which tokens are masked does not depend on their position.
    by_place = noise.masked.unflatten(1, (-1, block_size)).double().mean((0, 1))
    assert by_place.std() < 4 * math.sqrt(0.25 / len(masks))


def test_blocks_without_an_admissible_number_keep_their_draw():
    """Check shares in [0.6, 0.9]: two tokens have no such share; a ragged last block of four has three masks."""
    starts = torch.tensor([0, 0, 2, 2, 4, 4, 4, 4]).expand(500, -1)
    how = {"seed": 4, "epoch": 0, "sample_ids": torch.arange(500)}
    plain = draw_noise(starts, schedule=Schedule(low=0.6, high=0.9), **how)
    clipped = draw_noise(starts, schedule=Schedule(low=0.6, high=0.9, clip_masked_share=True), **how)
    assert torch.equal(clipped.masked[:, :4], plain.masked[:, :4])
    assert set(clipped.masked[:, 4:].sum(1).tolist()) == {3}
    assert torch.equal(clipped.mask_rate, plain.mask_rate)
    alone = draw_noise(
        starts[:1],
        schedule=Schedule(low=0.6, high=0.9, clip_masked_share=True),
        **how | {"sample_ids": torch.tensor([7])},
    )
    assert torch.equal(alone.masked[0], clipped.masked[7])


def test_copies_are_complementary_only_under_a_mirrored_schedule():
    starts = torch.zeros(8, 64, dtype=torch.int64)
    for schedule, mirrored in (
        (Schedule(), True),
        (Schedule(low=0.2, high=0.8, clip_masked_share=True), True),
        (Schedule("cosine"), False),
        (Schedule("test_smoothstep"), True),
        (Schedule(num_steps=8), False),
        (Schedule(low=0.2, high=0.9), False),
    ):
        first, second = draw_copies(starts, copies=2, schedule=schedule, seed=1, epoch=0, sample_ids=torch.arange(8))
        assert torch.equal(first.masked, ~second.masked) == mirrored, schedule
        assert torch.equal(second.weight, torch.from_numpy(schedule.weight(second.mask_rate.numpy())))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "sine"}, "'sine': did you mean cosine"),
        ({"weights": "flat"}, "'flat'.*nelbo, unit_when_heavy"),
        ({"low": -0.1}, "0 <= low <= high <= 1"),
        ({"high": 1.1}, "0 <= low <= high <= 1"),
        ({"low": 0.8, "high": 0.3}, "0 <= low <= high <= 1"),
        ({"high": 0.0}, "high > 0"),
        ({"low": math.nan}, "0 <= low <= high <= 1"),
        ({"num_steps": 0}, "T is 0"),
        ({"name": "cosine", "low": 0.3}, "need a schedule that can be clipped.*cosine"),
        ({"num_steps": 4, "high": 0.9}, "finite-T linear"),
    ],
)
def test_impossible_schedules_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Schedule(**options)


@pytest.mark.parametrize(
    ("part", "wrong", "words"),
    [
        ("rate", lambda self, level: level / 2, "goes from 0 to 0.5, and must go from 0 to 1"),
        ("rate", lambda self, level: level * np.nan, "goes from nan to nan"),
        ("level", lambda self, rate: 1 - rate, "`level` is not the inverse"),
        ("slope", lambda self, level: np.full_like(level, 2), "`slope` is not the derivative"),
    ],
)
def test_a_curve_whose_parts_contradict_each_other_is_refused_with_the_recipe(
    monkeypatch: pytest.MonkeyPatch, part: str, wrong: Callable, words: str
) -> None:
    """Check that such a curve is refused, since it would train with wrong weights."""
    diffusion = {"noise_schedule": "test_smoothstep", "mask_rate_low": 0.0, "mask_rate_high": 1.0}
    recipe = Recipe.model_validate(tiny_recipe(diffusion=diffusion))
    check_recipe(recipe, 1)
    monkeypatch.setattr(Smoothstep, part, wrong)
    with pytest.raises(RecipeError, match=rf"noise_schedule=test_smoothstep: its .*{words}"):
        check_recipe(recipe, 1)


@pytest.mark.parametrize("name", NAMES)
def test_the_package_s_curves_hold_together(name: str) -> None:
    assert schedules.get(name)().problem() is None
