"""Compute lower bounds of the log-likelihood of continuations: the NELBO with a clean context.

Only the tokens of a continuation are masked, at rates over the whole of [0, 1]. The context stays clean, also inside
the continuation's first block. The positions behind the continuation in its last block are always masked, so that
nothing tells the model where the continuation ends.

The bound is one of the likelihood when those positions behind the continuation stay masked. `generate` fills them too,
in an order drawn over the whole block; where the last block is not full, it therefore samples from another
distribution. At block size 1 there are no such positions, and the number is the likelihood itself (except for a
score-entropy model).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bd3_scale.attention.spans import make_spans
from bd3_scale.data.batch import Batch
from bd3_scale.diffusion.noise import Noise, draw_noise
from bd3_scale.diffusion.schedule import Schedule
from bd3_scale.evaluate.nelbo import token_nll, weighted_sums
from bd3_scale.model.transformer import BlockDiffusionTransformer
from bd3_scale.objective import Objective
from bd3_scale.objective.block_diffusion import NOISE_SEED, BlockDiffusion
from bd3_scale.parallel.groups import ProcessGroups, placement

BATCH = 16
Pair = tuple[list[int], list[int]]


class ContinuationBounds:
    """Computes bounds with one model.

    max_length: most tokens of context and continuation together; draws: noise draws for each continuation.
    """

    def __init__(
        self,
        model: BlockDiffusionTransformer,
        groups: ProcessGroups,
        objective: Objective,
        *,
        max_length: int,
        draws: int,
    ) -> None:
        if not isinstance(objective, BlockDiffusion):
            raise ValueError("the likelihood of continuations needs a model trained for block diffusion")
        self._model, self._groups, self._objective = model, groups, objective
        self._block_size = block_size = objective.block_size
        self._draws = objective.num_draws(draws)
        # Noise is drawn for the longest text, whatever a text's length: a position then has the same noise for all
        # answers to a question, which makes their differences less noisy.
        length = -(-max_length // block_size) * block_size
        self._block_start = make_spans(torch.zeros(1, length, dtype=torch.int32), block_size)[1]

    @torch.no_grad()
    def of(self, pairs: Sequence[Pair], documents: Sequence[int]) -> list[float]:
        """Return the bound in nats of each continuation after its context; pairs of one document get equal noise."""
        # Sorted by length, a batch holds rows of similar length and little padding; a row's noise is its own.
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
        bounds = [0.0] * len(pairs)
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            batch_bounds = self._batch_bounds([pairs[i] for i in rows], [documents[i] for i in rows])
            for i, bound in zip(rows, batch_bounds, strict=True):
                bounds[i] = bound
        return bounds

    def _batch_bounds(self, pairs: Sequence[Pair], documents: Sequence[int]) -> list[float]:
        longest = max(len(given) + len(scored) for given, scored in pairs)
        length = -(-longest // self._block_size) * self._block_size
        tokens = torch.full((len(pairs), length), self._model.vocabulary.eos_id)
        counted, context = (torch.zeros(tokens.shape, dtype=torch.bool) for _ in range(2))
        for row, (given, scored) in enumerate(pairs):
            tokens[row, : len(given) + len(scored)] = torch.tensor(given + scored, dtype=torch.int64)
            counted[row, len(given) : len(given) + len(scored)] = True
            context[row, : len(given)] = True
        start = torch.zeros(tokens.shape, dtype=torch.int32)
        ids = torch.tensor(documents)
        batch = Batch(
            ids, ids, 0 * ids, 0 * ids, tokens, start, torch.arange(length).expand_as(tokens), counted, context
        )
        noises = [self._noise(pairs, documents, length, draw) for draw in range(self._draws)]
        drawn = [
            self._objective.draw_of(batch, noise, place=placement(self._groups, [self._model])) for noise in noises
        ]
        sums = weighted_sums(drawn, token_nll([self._model], drawn, self._groups), counted)
        return [-float(bound) for bound in sums.mean(0)]

    def _noise(self, pairs: Sequence[Pair], documents: Sequence[int], length: int, draw: int) -> Noise:
        """Draw the noise of each row independently; the context is never masked, what follows the continuation
        always."""
        masked = torch.ones(len(pairs), length, dtype=torch.bool)
        rate = torch.ones(len(pairs), length)
        for row, ((given, scored), document) in enumerate(zip(pairs, documents, strict=True)):
            end = len(given) + len(scored)
            noise = draw_noise(
                self._block_start,
                seed=NOISE_SEED,
                epoch=0,
                sample_ids=torch.tensor([document]),
                schedule=Schedule(low=1.0 if self._block_size == 1 else 0.0),
                draw=draw,
                num_draws=self._draws,
            )
            masked[row, :end], rate[row, :end] = noise.masked[0, :end], noise.mask_rate[0, :end]
            masked[row, : len(given)] = False
        return Noise(masked, rate, _reciprocal(rate))


def _reciprocal(rate: Tensor) -> Tensor:
    # The NELBO weights a masked token with 1/p under a linear schedule (Sahoo et al., NeurIPS 2024); at rate 0 no
    # token is masked, and the weight is not used.
    return torch.where(rate > 0, 1 / rate, 0.0)
