"""Weigh token losses into the negative evidence lower bound (NELBO), and estimate it with standard errors.

The NELBO of one block is the integral over the noise level t of −α'/(1 − α) times the negative log-likelihood (nll)
of its masked tokens (BD3-LM: Arriola et al., ICLR 2025, section 3, equation 8; MDLM: Sahoo et al., NeurIPS 2024).
`schedule` has the factor of each noise schedule; it is 1/t for the linear one. Only masked tokens enter, because the
model copies the tokens that are shown (the SUBS parameterisation of MDLM), so that these cost nothing.

Under a clipped interval of mask rates the sum is a training loss, and not a bound of the likelihood.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bd3_scale.diffusion.noise import Noise


def loss_weight(noise: Noise) -> Tensor:
    """Return the factor of each token's nll, float32 [B, L], on the host; 0 where the token is not masked."""
    return torch.where(noise.masked, noise.weight, 0.0)


def sequence_nelbo(token_nll: Tensor, noise: Noise, counted: Tensor) -> Tensor:
    """Estimate each sequence's NELBO in nats from one draw, float64 [B]; the mean over draws is unbiased.

    token_nll: float64 [B, L], nats of the masked tokens; counted: bool [B, L], the tokens that perplexity counts. All
    tensors are on the host.
    """
    return (token_nll * loss_weight(noise) * counted).sum(1)


@dataclass(frozen=True)
class NelboEstimate:
    """A NELBO in nats a counted token; a standard error is None where one draw, or one sequence, cannot give it."""

    nelbo: float
    noise_standard_error: float | None
    text_standard_error: float | None
    num_tokens: int
    num_sequences: int
    num_draws: int

    @property
    def perplexity(self) -> float:
        """Return exp(nelbo), an upper bound of the perplexity; exact at block size 1 with every token masked."""
        # exp(710) overflows a float64, where math.exp raises in place of returning inf.
        return math.exp(self.nelbo) if self.nelbo < 700 else math.inf


def estimate_nelbo(sequence_sums: Tensor, num_tokens: Tensor) -> NelboEstimate:
    """Return the mean NELBO a token over draws and sequences, with its standard errors.

    sequence_sums: float64 [draws, sequences], nats, from `sequence_nelbo`; num_tokens: int [sequences], counted tokens.

    The noise error says how far other noise on the same text would move the mean. It adds each sequence's variance over
    its draws, since sequences draw independently. It also treats the draws of one sequence as independent, although
    their levels are stratified. It is usually too small: the weight 1/p has no finite variance near p = 0, and few
    blocks rarely draw such small rates. With few sequences the true error was 1.1 to 1.9 times the estimated one.

    The text error says how far other text would move the mean, noise included. It is the standard error of a ratio
    estimator over sequences (Cochran, Sampling Techniques, chapter 6), because sequences have unequal numbers of
    counted tokens.

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
