"""The negative evidence lower bound (NELBO) of block diffusion, as a loss and as a measured number.

For one block at noise level t the bound is the integral over t of -α'/(1-α) times the negative log-likelihood (nll)
of the masked tokens; `schedule` has the factor of each noise schedule, 1/t for the linear one (Arriola et al., ICLR
2025, section 3; Sahoo et al., NeurIPS 2024). Under a clipped interval of mask rates the sum is a training loss and
no bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bd3_scale.diffusion.noise import Noise


def loss_weight(noise: Noise) -> Tensor:
    """float32 [B, L], on the host: what multiplies each token's nll; 0 where it is not masked."""
    return torch.where(noise.masked, noise.weight, 0.0)


def sequence_nelbo(token_nll: Tensor, noise: Noise, counted: Tensor) -> Tensor:
    """One draw's estimate of each sequence's NELBO in nats, float64 [B]; its mean over draws is unbiased.

    token_nll: float64 [B, L], nats of the masked tokens; counted: bool [B, L], the tokens that perplexity counts. All
    on the host.
    """
    return (token_nll * loss_weight(noise) * counted).sum(1)


@dataclass(frozen=True)
class NelboEstimate:
    """Nats a counted token; a standard error is None where a single draw, or sequence, leaves it unknown."""

    nelbo: float
    noise_standard_error: float | None
    text_standard_error: float | None
    num_tokens: int
    num_sequences: int
    num_draws: int

    @property
    def perplexity(self) -> float:
        """exp(nelbo): an upper bound on the model's perplexity, exact at block size 1 with every token masked."""
        return math.exp(self.nelbo) if self.nelbo < 700 else math.inf


def estimate_nelbo(sequence_sums: Tensor, num_tokens: Tensor) -> NelboEstimate:
    """Mean NELBO a token over draws and sequences, with its standard errors.

    sequence_sums: float64 [draws, sequences], nats, from `sequence_nelbo`; num_tokens: int [sequences], counted tokens.

    The noise error says how far fresh draws on the same text would move the mean: each sequence's variance over its
    draws, added up, since sequences draw independently. It is estimated from the draws at hand, and treats those of a
    sequence as independent, too, although their levels are stratified. The weight 1/p has no finite variance near
    p = 0, and where few blocks are measured they rarely meet the light rates, so that the figure is usually too small:
    with few sequences the true error was 1.1 to 1.9 times the one told. The text error says how far other text would
    move the mean: the ratio estimator's standard error over sequences (Cochran, Sampling Techniques, chapter 6), noise
    included.

    ValueError: no counted token.
    """
    num_draws, num_sequences = sequence_sums.shape
    total = int(num_tokens.sum())
    if total == 0:
        raise ValueError(f"none of {num_sequences} sequences has a token to count: give held-out text")
    sequence_means = sequence_sums.double().mean(0)
    nelbo = float(sequence_means.sum()) / total
    noise_variance = sequence_sums.double().var(0).sum() / num_draws if num_draws > 1 else None
    residual = sequence_means - nelbo * num_tokens
    text_variance = residual.square().sum() * num_sequences / (num_sequences - 1) if num_sequences > 1 else None
    noise_error, text_error = (
        None if variance is None else math.sqrt(variance) / total for variance in (noise_variance, text_variance)
    )
    return NelboEstimate(nelbo, noise_error, text_error, total, num_sequences, num_draws)
