"""NELBO perplexity of held-out sequences: the bound over mask rates U[0, 1], exact at block size 1."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from bd3_scale.attention.spans import make_spans
from bd3_scale.data.batch import Batch
from bd3_scale.data.corrupt import corrupt
from bd3_scale.diffusion.nelbo import NelboEstimate, estimate_nelbo, sequence_nelbo
from bd3_scale.diffusion.noise import draw_noise
from bd3_scale.model.transformer import BlockDiffusionTransformer
from bd3_scale.parallel.collective import gather_objects
from bd3_scale.parallel.groups import ProcessGroups

# Evaluation noise depends on no run's seed, so that runs are compared under the same masks.
NOISE_SEED = 0


@torch.no_grad()
def evaluate_nelbo(
    model: BlockDiffusionTransformer,
    batches: Iterable[Batch],
    groups: ProcessGroups,
    *,
    block_size: int,
    draws: int,
    progress: Callable[[int], object] = lambda sequences: None,
) -> NelboEstimate:
    """NELBO in nats a counted token over all data-parallel ranks' `batches` (collective).

    At block size 1 every token is masked, once: an exact negative log-likelihood, left to right. `progress` is told the
    number of sequences finished after each batch.
    """
    exact = block_size == 1
    draws = 1 if exact else draws
    model.eval()
    sums, counted = [], []
    for batch in batches:
        counted.append(batch.counted.sum(1))
        sums.append(torch.stack([_draw(model, batch, block_size, draw, draws, exact=exact) for draw in range(draws)]))
        progress(len(batch.ids))
    local = (
        (torch.cat(sums, 1), torch.cat(counted)) if sums else (torch.empty(draws, 0).double(), torch.empty(0).long())
    )
    ranks = gather_objects(local, groups.dp_cp)
    return estimate_nelbo(torch.cat([s for s, _ in ranks], 1), torch.cat([c for _, c in ranks]))


def _draw(
    model: BlockDiffusionTransformer, batch: Batch, block_size: int, draw: int, draws: int, *, exact: bool
) -> Tensor:
    """One draw's NELBO of each sequence, float64 [B]."""
    spans = make_spans(batch.document_start, block_size)
    noise = draw_noise(
        spans[1],
        seed=NOISE_SEED,
        epoch=0,
        sample_ids=batch.ids,
        low=1.0 if exact else 0.0,
        high=1.0,
        draw=draw,
        num_draws=draws,
    )
    device = next(model.parameters()).device
    noisy = corrupt(batch, noise, spans, mask_id=model.vocabulary.mask_id, device=device)
    nll = model(noisy.noisy_BL, noisy.clean_BL, noisy.positions_BL, noisy.spans, noisy.rows_M)
    return sequence_nelbo(nll.cpu(), noise, batch.counted)
