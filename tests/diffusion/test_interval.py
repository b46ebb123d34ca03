"""Check the interval search on toy models with known variances, and against brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bd3_scale.diffusion.interval import block_moments, candidates, search_intervals
from bd3_scale.diffusion.noise import draw_noise
from bd3_scale.diffusion.schedule import LINEAR

BLOCK, NUM_BLOCKS = 4, 16


def draws_of(nll_of_count, sequences, draws=2, seed=1):
    """Draw blocks of a toy model whose nll depends on the number of masks: nll and rates [draws, sequences, blocks]."""
    position = torch.arange(BLOCK * NUM_BLOCKS)
    starts = (position - position % BLOCK).expand(sequences, -1)
    nll, rates = [], []
    for draw in range(draws):
        noise = draw_noise(
            starts,
            seed=seed,
            epoch=0,
            sample_ids=torch.arange(sequences),
            schedule=LINEAR,
            draw=draw,
            num_draws=draws,
        )
        nll.append(nll_of_count(noise.masked.unflatten(1, (-1, BLOCK)).sum(2).double()))
        rates.append(noise.mask_rate[:, ::BLOCK])
    return torch.stack(nll), torch.stack(rates)


def true_variance(nll_of_count, low, high):
    """Return the variance by enumerating the number of masks and by quadrature over the rate."""
    nodes, weights = np.polynomial.legendre.leggauss(400)
    rate = low + (high - low) * (nodes + 1) / 2
    counts = np.arange(BLOCK + 1)
    law = np.array([math.comb(BLOCK, k) * rate**k * (1 - rate) ** (BLOCK - k) for k in counts])
    loss = nll_of_count(torch.tensor(counts).double()).numpy()[:, None] / (rate * BLOCK)
    mean, square = ((law * loss**power).sum(0) @ weights / 2 for power in (1, 2))
    return square - mean**2


TOYS = {
    # Every token costs the same whatever is masked, so heavy masking, with weights near 1, has the least variance.
    "constant": (lambda k: 2.0 * k, (0.5, 1.0)),
    # Tokens are harder the more are masked: light masking has less variance, until the weight 1 / p outweighs it.
    "crowded": (lambda k: k**3, None),
}


def test_the_grid_is_the_one_that_is_described():
    grid = candidates(4)
    assert grid[0] == (0.0, 1.0)
    assert len(grid) == len(set(grid)) == 1 + 11 + 9 + 7 + 5 + 3
    assert {round(high - low, 2) for low, high in grid} == {0.5, 0.6, 0.7, 0.8, 0.9, 1.0}
    assert all(0 <= low < high <= 1 for low, high in grid)
    assert (0.3, 0.8) in grid
    assert candidates(1) == [*grid, (1.0, 1.0)]


@pytest.mark.parametrize("toy", TOYS)
def test_variances_and_the_best_interval_of_a_toy_model(toy):
    nll_of_count, best = TOYS[toy]
    search = search_intervals(block_moments(*draws_of(nll_of_count, 2000), BLOCK), BLOCK)
    truth = {interval: true_variance(nll_of_count, *interval) for interval in candidates(BLOCK)}
    away = [interval for interval in search.variances if interval.low >= 0.05]
    assert len(away) > 20
    for interval in away:
        error = abs(interval.variance - truth[interval.low, interval.high])
        assert error < 4.5 * interval.standard_error, interval
        assert interval.standard_error < 0.1 * interval.variance
    expected = best or min((i for i in truth if i[0]), key=lambda i: truth[i])
    assert (search.best.low, search.best.high) == expected


def test_the_estimate_is_that_of_all_pairs_of_other_sequences():
    nll, rates = draws_of(lambda k: k**2 + 1, 17)
    nll *= torch.rand(nll.shape, generator=torch.Generator().manual_seed(0)) + torch.arange(17)[None, :, None]
    search = search_intervals(block_moments(nll, rates, BLOCK), BLOCK)
    for interval in search.variances[::6]:
        values = [
            (s, float(nll[d, s, k] / (rates[d, s, k] * BLOCK)))
            for d in range(2)
            for s in range(17)
            for k in range(NUM_BLOCKS)
            if interval.low <= rates[d, s, k] <= interval.high
        ]
        halves = [x * x for _, x in values]
        crossed = [x * y for s, x in values for t, y in values if s != t]
        assert interval.variance == pytest.approx(np.mean(halves) - np.mean(crossed), rel=1e-6)


def test_standard_errors_are_the_spread_over_fresh_draws():
    found = [
        search_intervals(block_moments(*draws_of(lambda k: k**2, 60, seed=seed), BLOCK), BLOCK).variances
        for seed in range(150)
    ]
    at = candidates(BLOCK).index((0.3, 0.8))
    spread = np.std([search[at].variance for search in found], ddof=1)
    claimed = math.sqrt(np.mean([search[at].standard_error ** 2 for search in found]))
    assert claimed == pytest.approx(spread, rel=0.2)


def test_block_size_one_is_exact_and_wants_every_token_masked():
    nll = torch.rand(1, 500, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4
    search = search_intervals(block_moments(nll, torch.ones_like(nll), 1), 1)
    found = {(i.low, i.high): i.variance for i in search.variances}
    assert found[1.0, 1.0] == pytest.approx(nll.var().item(), rel=1e-2)
    assert found[0.5, 1.0] == pytest.approx(
        found[1.0, 1.0] + nll.square().mean().item() * (2 * math.log(2) - 1), rel=1e-9
    )
    assert found[0.0, 1.0] == math.inf
    assert search.follow((0.0, 1.0)) == (1.0, 1.0)


def test_the_interval_moves_only_for_a_gain_beyond_the_noise():
    clear = search_intervals(block_moments(*draws_of(lambda k: 2.0 * k, 2000), BLOCK), BLOCK)
    assert clear.follow((0.0, 1.0)) == (0.5, 1.0)
    assert clear.follow((0.5, 1.0)) == (0.5, 1.0)
    assert clear.follow((0.123, 0.7)) == (0.5, 1.0)


def test_little_text_rarely_moves_it_from_the_truly_best():
    """Check the crowded toy, which has a second, distant interval whose variance is 3% above the best."""
    nll_of_count, _ = TOYS["crowded"]
    truth = min((i for i in candidates(BLOCK) if i[0]), key=lambda i: true_variance(nll_of_count, *i))
    left, other = 0, 0
    for seed in range(60):
        search = search_intervals(block_moments(*draws_of(nll_of_count, 24, draws=1, seed=seed), BLOCK), BLOCK)
        other += (search.best.low, search.best.high) != truth
        left += search.follow(truth) != truth
    assert other > 30
    assert left < other / 3


def test_too_few_sequences_say_what_to_raise():
    with pytest.raises(ValueError, match=r"has 8 sequences and needs 16: take more held-out text"):
        search_intervals(block_moments(*draws_of(lambda k: k, 8), BLOCK), BLOCK)


def test_an_interval_that_the_text_cannot_tell_is_no_candidate_and_stays():
    """Check one block a sequence with all rates above a half: no draw falls in a narrow low interval."""
    generator = torch.Generator().manual_seed(1)
    rates = 0.5 + 0.5 * torch.rand(1, 64, 1, generator=generator)
    search = search_intervals(block_moments(rates * 3, rates, 4), 4)
    told = {(interval.low, interval.high) for interval in search.variances}
    assert (0.0, 0.5) not in told
    assert {(0.0, 1.0), (0.5, 1.0)} < told
    assert search.follow((0.0, 0.5)) == (0.0, 0.5)


def test_text_that_tells_nothing_moves_nothing():
    """Check few and uneven blocks, whose unbiased variance may be below 0, so that its ratio has no logarithm."""
    generator = torch.Generator().manual_seed(0)
    undecided = 0
    for _ in range(60):
        rates = torch.rand(4, 16, 1, generator=generator)
        search = search_intervals(
            block_moments(rates * (1 + torch.rand(16, 1, generator=generator)), rates, 1 << 9), 1 << 9
        )
        at = next((i for i, found in enumerate(search.variances) if (found.low, found.high) == (0.5, 1.0)), None)
        if at is not None and not (search._folds[at] > 0).all():
            undecided += 1
            assert search.follow((0.5, 1.0)) == (0.5, 1.0)
    assert undecided > 0


@pytest.mark.parametrize("block_size", [1, BLOCK])
def test_blocks_without_text_are_as_if_they_were_not_there(block_size):
    nll, rates = draws_of(lambda k: 2.0 * k, 32)
    rates = torch.ones_like(rates) if block_size == 1 else rates
    counted = torch.rand(nll.shape[1:], generator=torch.Generator().manual_seed(1)) < 0.7
    some = block_moments(nll * counted, rates, block_size, counted)
    alone = torch.zeros_like(some)
    for sequence, row in enumerate(counted):
        alone[:, sequence] = block_moments(
            nll[:, sequence][:, row][:, None], rates[:, sequence][:, row][:, None], block_size
        )[:, 0]
    torch.testing.assert_close(some, alone)
    assert not search_intervals(some, block_size).variances[0].variance < 0
