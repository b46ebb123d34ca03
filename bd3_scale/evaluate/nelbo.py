"""NELBO perplexity of held-out sequences: the bound over mask rates U[0, 1], exact at block size 1."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from bd3_scale.attention.spans import make_spans
from bd3_scale.data.batch import Batch
from bd3_scale.data.corrupt import Context, corrupt, masked_places, next_token_places, next_tokens
from bd3_scale.diffusion.nelbo import NelboEstimate, estimate_nelbo, sequence_nelbo
from bd3_scale.diffusion.noise import Noise, draw_noise
from bd3_scale.diffusion.schedule import Schedule
from bd3_scale.model.build import Chunks
from bd3_scale.parallel.collective import gather_objects
from bd3_scale.parallel.groups import ProcessGroups
from bd3_scale.parallel.schedule import token_losses
from bd3_scale.recipe.schema import DiffusionRecipe

# Evaluation noise depends on no run's seed, so that runs are compared under the same masks.
NOISE_SEED = 0


@torch.no_grad()
def evaluate_nelbo(
    chunks: Chunks,
    batches: Iterable[Batch],
    groups: ProcessGroups,
    *,
    diffusion: DiffusionRecipe,
    draws: int,
    progress: Callable[[int], object] = lambda sequences: None,
) -> NelboEstimate:
    """NELBO in nats a counted token over all data-parallel ranks' `batches` (collective).

    At block size 1 every token is masked, once: an exact negative log-likelihood, left to right. So is that of a
    next-token model, which does not predict the first token of a document: it does not count. All data-parallel ranks
    have as many batches, of one shape; a sequence of id −1 only fills one up. `progress` is told the number of
    sequences finished after each batch.
    """
    draws = 1 if is_exact(diffusion) else draws
    for chunk in chunks:
        chunk.eval()
    sums, counted = [], []
    for batch in batches:
        real = batch.ids >= 0
        batch = counted_tokens(batch, diffusion)
        if diffusion.objective == "next_token":
            batch_sums = _next_token_sums(chunks, batch, groups)
        else:
            noises = [_draw(batch, diffusion.block_size, draw, draws) for draw in range(draws)]
            batch_sums = _sequence_sums(chunks, batch, noises, groups, diffusion.block_size)
        counted.append(batch.counted.sum(1)[real])
        sums.append(batch_sums[:, real])
        progress(int(real.sum()))
    local = (
        (torch.cat(sums, 1), torch.cat(counted)) if sums else (torch.empty(draws, 0).double(), torch.empty(0).long())
    )
    ranks = gather_objects(local, groups.dp)
    return estimate_nelbo(torch.cat([s for s, _ in ranks], 1), torch.cat([c for _, c in ranks]))


def is_exact(diffusion: DiffusionRecipe) -> bool:
    """What `evaluate_nelbo` measures is the likelihood, and no bound of it."""
    return diffusion.block_size == 1 or diffusion.objective == "next_token"


def _draw(batch: Batch, block_size: int, draw: int, draws: int) -> Noise:
    return draw_noise(
        make_spans(batch.document_start, block_size)[1],
        seed=NOISE_SEED,
        epoch=0,
        sample_ids=batch.ids.clamp(min=0),
        schedule=Schedule(low=1.0 if block_size == 1 else 0.0),
        draw=draw,
        num_draws=draws,
    )


def _sequence_sums(chunks: Chunks, batch: Batch, noises: list[Noise], groups: ProcessGroups, block_size: int) -> Tensor:
    """Each draw's NELBO of each sequence, float64 [draws, B], on every rank that holds a part of them."""
    device = next(chunks[0].parameters()).device
    context: Context = (groups.cp.rank(), groups.cp.size())
    mask_id = chunks[0].vocabulary.mask_id
    inputs = [corrupt(batch, [n], block_size, mask_id=mask_id, device=device, context=context) for n in noises]
    # The interleaved schedule takes micro-batches in groups of the number of stages.
    filled = inputs + inputs[-1:] * (-len(inputs) % groups.pp.size() if len(chunks) > 1 else 0)
    losses = token_losses(chunks, filled, groups)[: len(noises)]
    sums = torch.zeros(len(noises), len(batch.ids), dtype=torch.float64)
    for draw, (nll, noise) in enumerate(zip(losses, noises, strict=False)):
        sums[draw] = sequence_nelbo(nll.cpu(), masked_places(noise, context), noise, batch.counted)
    return _summed(sums, groups, device)


def _next_token_sums(chunks: Chunks, batch: Batch, groups: ProcessGroups) -> Tensor:
    """Each sequence's negative log-likelihood, float64 [1, B], on every rank that holds a part of it."""
    device = next(chunks[0].parameters()).device
    context: Context = (groups.cp.rank(), groups.cp.size())
    inputs = next_tokens(batch, device=device, context=context)
    losses = token_losses(chunks, [inputs] * (groups.pp.size() if len(chunks) > 1 else 1), groups)[:1]
    nll = torch.zeros(batch.tokens.shape, dtype=torch.float64)
    for loss in losses:
        nll[next_token_places(batch, context)] = loss.double().cpu()
    return _summed((nll * batch.counted).sum(1)[None], groups, device)


def counted_tokens(batch: Batch, diffusion: DiffusionRecipe) -> Batch:
    """The batch, of which a next-token model's count has no first token of a document: none is predicted."""
    if diffusion.objective != "next_token":
        return batch
    return replace(batch, counted=batch.counted & (torch.arange(batch.tokens.shape[1]) > batch.document_start))


def _summed(sums: Tensor, groups: ProcessGroups, device: torch.device) -> Tensor:
    """The sum over context-parallel ranks and stages, of which only the last one has any."""
    sums = sums.to(device)
    dist.all_reduce(sums, group=groups.cp)
    dist.all_reduce(sums, group=groups.pp)
    return sums.cpu()
