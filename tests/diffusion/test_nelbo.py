"""Compare the NELBO estimate with exact enumeration: three tokens, a vocabulary of two, a random table as the model."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from bd3_scale.diffusion.nelbo import NelboEstimate, estimate_nelbo, loss_weight, sequence_nelbo
from bd3_scale.diffusion.noise import Noise, draw_noise
from bd3_scale.diffusion.schedule import LINEAR, Schedule

BLOCK = 3


def table_nll(seed: int = 0) -> Tensor:
    """Return nll [2^3 patterns, 3 tokens] of the true tokens; a network's may be any numbers, as it depends on its
    input."""
    return torch.rand(2**BLOCK, BLOCK, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3


def pattern_index(masked: Tensor) -> Tensor:
    return (masked.long() * torch.tensor([4, 2, 1])).sum(-1)


def exact_nelbo(nll: Tensor) -> float:
    """Return Σ over patterns with k ≥ 1 masks of their nll times ∫ t^k (1-t)^(n-k) / t dt = B(k, n-k+1)."""
    total = 0.0
    for pattern in itertools.product([0, 1], repeat=BLOCK):
        k = sum(pattern)
        if k:
            weight = math.gamma(k) * math.gamma(BLOCK - k + 1) / math.gamma(BLOCK + 1)
            row = nll[int(pattern_index(torch.tensor(pattern)))]
            total += weight * float(sum(row[i] for i in range(BLOCK) if pattern[i]))
    return total


def draw(sample_ids: Tensor, block_size: int, schedule: Schedule = LINEAR, **changes: object) -> Noise:
    position = torch.arange(BLOCK)
    starts = (position - position % block_size).expand(len(sample_ids), -1)
    arguments = {"seed": 5, "epoch": 0, "sample_ids": sample_ids, "schedule": schedule}
    return draw_noise(starts, **(arguments | changes))


def one_draw(noise: Noise, nll: Tensor) -> Tensor:
    token_nll = nll[pattern_index(noise.masked)] * noise.masked
    return sequence_nelbo(token_nll, noise, torch.ones_like(noise.masked))


def test_exact_enumeration_of_an_order_agnostic_model_is_its_likelihood() -> None:
    # In a model of independent tokens, Σ nll is the same for any masks: the bound is tight.
    independent = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64).expand(8, -1)
    assert exact_nelbo(independent) == pytest.approx(3.3, abs=1e-12)


def test_estimate_over_many_draws_agrees_with_enumeration() -> None:
    nll = table_nll()
    num_draws, num_sequences = 4, 10_000
    ids = torch.arange(num_sequences)
    sums = torch.stack([one_draw(draw(ids, BLOCK, draw=d, num_draws=num_draws), nll) for d in range(num_draws)])
    estimate = estimate_nelbo(sums, torch.full((num_sequences,), BLOCK))
    # Sequences draw independently and have the same text, so their spread is the estimate's own error.
    error = float(sums.mean(0).std()) / math.sqrt(num_sequences) / BLOCK
    assert abs(estimate.nelbo - exact_nelbo(nll) / BLOCK) < 4 * error
    assert error < 0.01
    assert estimate.noise_standard_error == pytest.approx(error, rel=0.3)


def test_clipped_weights_integrate_the_interval() -> None:
    # Under U[low, high] each token's expected weight is 1: masked with probability p, weighted 1/p.
    noise = draw(torch.arange(20_000), BLOCK, Schedule(low=0.3, high=0.8))
    weight = loss_weight(noise)
    assert weight.dtype == torch.float32
    assert torch.equal(weight > 0, noise.masked)
    assert float(weight.double().mean()) == pytest.approx(
        1.0, abs=4 * float(weight.double().mean(1).std()) / math.sqrt(20_000)
    )


def test_block_size_one_all_masked_is_exact_and_the_mean_of_random_masks() -> None:
    # At block size 1 a token sees only the clean past: its nll cannot depend on the mask.
    nll = torch.tensor([0.7, 2.1, 0.4], dtype=torch.float64)
    ids = torch.arange(10_000)
    all_masked = draw(ids, 1, Schedule(low=1.0))
    exact = sequence_nelbo(nll.expand(len(ids), -1), all_masked, torch.ones_like(all_masked.masked))
    assert torch.equal(exact, nll.sum().expand(len(ids)))
    noise = draw(ids, 1)
    random = sequence_nelbo(nll * noise.masked, noise, torch.ones_like(noise.masked))
    error = float(random.std()) / math.sqrt(len(ids))
    assert abs(float(random.mean()) - 3.2) < 4 * error


def test_only_counted_tokens_add_to_the_sum() -> None:
    noise = draw(torch.arange(2), BLOCK, Schedule(low=1.0))
    counted = torch.tensor([[True, True, False], [False, False, False]])
    assert sequence_nelbo(torch.arange(6.0).view(2, 3).double(), noise, counted).tolist() == [1.0, 0.0]


def test_standard_errors_of_a_worked_example() -> None:
    sums = torch.tensor([[10.0, 22.0], [14.0, 26.0]], dtype=torch.float64)
    estimate = estimate_nelbo(sums, torch.tensor([10, 20]))
    # means 12 and 24 over 30 tokens; variances over draws 8 and 8; residuals 12 - 1.2·10 and 24 - 1.2·20.
    assert estimate == NelboEstimate(
        nelbo=1.2,
        noise_standard_error=pytest.approx(math.sqrt((8 + 8) / 2) / 30),
        text_standard_error=pytest.approx(0.0, abs=1e-12),
        num_tokens=30,
        num_sequences=2,
        num_draws=2,
    )
    assert estimate.perplexity == pytest.approx(math.exp(1.2))


def test_errors_are_right_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 50, (40,), generator=generator)
    truth, trials, noise_sd, text_sd = 2.0, 600, 3.0, 0.5
    estimates = []
    for _ in range(trials):
        rate = truth + text_sd * torch.randn(40, generator=generator, dtype=torch.float64)
        sums = rate * tokens + noise_sd * torch.randn(3, 40, generator=generator, dtype=torch.float64)
        estimates.append(estimate_nelbo(sums, tokens))
    spread = torch.tensor([e.nelbo for e in estimates]).std().item()
    claimed = math.sqrt(sum(e.text_standard_error**2 for e in estimates) / trials)
    assert claimed == pytest.approx(spread, rel=0.15)
    claimed_noise = math.sqrt(sum(e.noise_standard_error**2 for e in estimates) / trials)
    assert claimed_noise == pytest.approx(noise_sd * math.sqrt(40 / 3) / int(tokens.sum()), rel=0.05)


def test_single_draw_and_sequence_leave_errors_unknown_and_no_token_is_refused() -> None:
    estimate = estimate_nelbo(torch.tensor([[3.0]]), torch.tensor([2]))
    assert (estimate.noise_standard_error, estimate.text_standard_error) == (None, None)
    with pytest.raises(ValueError, match="held-out"):
        estimate_nelbo(torch.tensor([[0.0]]), torch.tensor([0]))
