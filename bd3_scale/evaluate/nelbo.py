"""NELBO perplexity of held-out sequences: the bound over mask rates U[0, 1], exact at block size 1."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from bd3_scale.attention.spans import make_spans
from bd3_scale.data.batch import Batch
from bd3_scale.data.corrupt import Context, corrupt, masked_places, next_token_places, next_tokens
from bd3_scale.diffusion.interval import IntervalSearch, block_moments, search_intervals
from bd3_scale.diffusion.nelbo import NelboEstimate, estimate_nelbo, sequence_nelbo
from bd3_scale.diffusion.noise import Noise, draw_noise
from bd3_scale.diffusion.schedule import Schedule
from bd3_scale.model.build import Chunks
from bd3_scale.parallel.collective import gather_tensors
from bd3_scale.parallel.groups import ProcessGroups
from bd3_scale.parallel.schedule import token_losses
from bd3_scale.recipe.schema import DiffusionRecipe

# Evaluation noise depends on no run's seed, so that runs are compared under the same masks.
NOISE_SEED = 0


@dataclass(frozen=True)
class HeldOut:
    """What held-out text says: the NELBO, and what a search of the clipped interval needs of it.

    nelbo: of the counted tokens. What pads a document behind its end is masked throughout and does not count: where a
    block is partly padding, this bounds the likelihood of its text when nothing behind the end is ever filled in, which
    is not what `generate` does there.
    padded: with what pads the last block of a document counted, too, and masked as in training, in nats a token that
    counts. The text is then what `generate` writes up to that block's end, and this an upper bound of its negative
    log-likelihood. None where it was not asked for; where no block is partly padding it is `nelbo`.
    moments: of `block_moments`, for all ranks' sequences in the order of their ids; None for a next-token model.
    """

    nelbo: NelboEstimate
    block_size: int
    moments: Tensor | None
    padded: NelboEstimate | None = None

    def intervals(self) -> IntervalSearch:
        """The loss's variance under every clipped interval. ValueError: too little text, or a next-token model."""
        if self.moments is None:
            raise ValueError("a next-token model masks nothing: it has no interval of mask rates to search")
        return search_intervals(self.moments, self.block_size)


@torch.no_grad()
def evaluate_nelbo(
    chunks: Chunks,
    batches: Iterable[Batch],
    groups: ProcessGroups,
    *,
    diffusion: DiffusionRecipe,
    draws: int,
    padded: bool = False,
    progress: Callable[[int], object] = lambda sequences: None,
) -> HeldOut:
    """NELBO in nats a counted token over all data-parallel ranks' `batches` (collective).

    At block size 1 every token is masked, once: an exact negative log-likelihood, left to right. So is that of a
    next-token model, which does not predict the first token of a document: it does not count. All data-parallel ranks
    have as many batches, of one shape; a sequence of id −1 only fills one up. `progress` is told the number of
    sequences finished after each batch. `padded`: also what `HeldOut` calls so, for another pass over the sequences in
    which a block is partly padding.
    """
    draws = 1 if diffusion.block_size == 1 else draws
    blocks = diffusion.objective != "next_token"
    for chunk in chunks:
        chunk.eval()
    sums, counted, moments = [torch.empty(2, draws, 0).double()], [torch.empty(2, 0).long()], []
    for batch in batches:
        real = batch.ids >= 0
        batch = counted_tokens(batch, diffusion)
        if blocks:
            noises = [evaluation_noise(batch, diffusion.block_size, draw, draws) for draw in range(draws)]
            # What pads a document tells nothing of its end: it is masked always, and does not count.
            noises = [replace(noise, masked=noise.masked | batch.padding) for noise in noises]
            nll = masked_nll(chunks, batch, noises, groups, diffusion.block_size)
            found = torch.stack([sequence_nelbo(*one, batch.counted) for one in zip(nll, noises, strict=True)])
            with_padding = _with_padding(chunks, batch, found, groups, diffusion.block_size) if padded else found
            sums.append(torch.stack([found, with_padding])[:, :, real])
            moments.append(_moments(nll, noises, batch.counted, diffusion.block_size)[:, real])
        else:
            found = (next_token_nll(chunks, batch, groups) * batch.counted).sum(2)
            sums.append(found.expand(2, -1, -1)[:, :, real])
        counted.append(torch.stack([batch.ids, batch.counted.sum(1)])[:, real])
        progress(int(real.sum()))
    ids, tokens = torch.cat(gather_tensors(torch.cat(counted, 1), groups.dp), 1)
    order = ids.argsort()  # whatever rank had them
    all_sums = torch.cat(gather_tensors(torch.cat(sums, 2), groups.dp), 2)[:, :, order]
    estimate, with_padding_counted = (estimate_nelbo(each, tokens[order]) for each in all_sums)
    everywhere = gather_tensors(torch.cat(moments, 1), groups.dp) if moments else []
    return HeldOut(
        estimate,
        diffusion.block_size,
        torch.cat(everywhere, 1)[:, order] if everywhere else None,
        with_padding_counted if padded else None,
    )


def _with_padding(chunks: Chunks, batch: Batch, sums: Tensor, groups: ProcessGroups, block_size: int) -> Tensor:
    """`sums` [draws, B], of sequences with blocks that are partly padding anew, with that padding counted."""
    start, end = make_spans(batch.document_start, block_size)[1:]
    text = torch.nn.functional.pad(batch.counted.cumsum(1), (1, 0))
    # Of each position's block: whether any token counts.
    in_text = (text.gather(1, end.long()) - text.gather(1, start.long())) > 0
    counts = batch.counted | (batch.padding & in_text)
    rows = (counts != batch.counted).any(1).nonzero()[:, 0]
    if not len(rows):
        return sums
    part, counts = batch.take(rows), counts[rows]
    noises = [evaluation_noise(part, block_size, draw, len(sums)) for draw in range(len(sums))]
    noises = [replace(noise, masked=noise.masked | (part.padding & ~counts)) for noise in noises]
    nll = masked_nll(chunks, part, noises, groups, block_size)
    sums = sums.clone()
    sums[:, rows] = torch.stack([sequence_nelbo(*one, counts) for one in zip(nll, noises, strict=True)])
    return sums


def _moments(nll: Tensor, noises: list[Noise], counted: Tensor, block_size: int) -> Tensor:
    """Of the blocks that hold text; what pads a document is not searched for."""
    rates = torch.stack([noise.mask_rate for noise in noises])[:, :, ::block_size]
    blocks = (nll * counted).unflatten(2, (-1, block_size)).sum(3)
    return block_moments(blocks, rates, block_size, counted.unflatten(1, (-1, block_size)).any(2))


def is_exact(diffusion: DiffusionRecipe) -> bool:
    """What `evaluate_nelbo` measures is the likelihood, and no bound of it."""
    return diffusion.objective == "next_token" or (
        diffusion.block_size == 1 and diffusion.objective == "block_diffusion"
    )


def evaluation_noise(batch: Batch, block_size: int, draw: int, draws: int) -> Noise:
    """Over mask rates U[0, 1]; at block size 1 everything is masked."""
    return draw_noise(
        make_spans(batch.document_start, block_size)[1],
        seed=NOISE_SEED,
        epoch=0,
        sample_ids=batch.ids.clamp(min=0),
        schedule=Schedule(low=1.0 if block_size == 1 else 0.0),
        draw=draw,
        num_draws=draws,
        shown=batch.shown,
    )


def masked_nll(chunks: Chunks, batch: Batch, noises: list[Noise], groups: ProcessGroups, block_size: int) -> Tensor:
    """Each draw's nll of every masked token, float64 [draws, B, L] in nats, 0 elsewhere; on every rank."""
    device = next(chunks[0].parameters()).device
    context: Context = (groups.cp.rank(), groups.cp.size())
    mask_id = chunks[0].vocabulary.mask_id
    inputs = [corrupt(batch, [n], block_size, mask_id=mask_id, device=device, context=context) for n in noises]
    # The interleaved schedule takes micro-batches in groups of the number of stages.
    filled = inputs + inputs[-1:] * (-len(inputs) % groups.pp.size() if len(chunks) > 1 else 0)
    losses = token_losses(chunks, filled, groups)[: len(noises)]
    nll = torch.zeros(len(noises), *batch.tokens.shape, dtype=torch.float64)
    for draw, (loss, noise) in enumerate(zip(losses, noises, strict=False)):
        nll[draw][masked_places(noise, context)] = loss.double().cpu()
    return _summed(nll, groups, device)


def next_token_nll(chunks: Chunks, batch: Batch, groups: ProcessGroups) -> Tensor:
    """The nll of every token but documents' first, float64 [1, B, L] in nats; on every rank."""
    device = next(chunks[0].parameters()).device
    context: Context = (groups.cp.rank(), groups.cp.size())
    inputs = next_tokens(batch, device=device, context=context)
    losses = token_losses(chunks, [inputs] * (groups.pp.size() if len(chunks) > 1 else 1), groups)[:1]
    nll = torch.zeros(1, *batch.tokens.shape, dtype=torch.float64)
    for loss in losses:
        nll[0][next_token_places(batch, context)] = loss.double().cpu()
    return _summed(nll, groups, device)


def counted_tokens(batch: Batch, diffusion: DiffusionRecipe) -> Batch:
    """The batch, of which a next-token model's count has no first token of a document: none is predicted."""
    if diffusion.objective != "next_token":
        return batch
    return replace(batch, counted=batch.counted & (torch.arange(batch.tokens.shape[1]) > batch.document_start))


def _summed(nll: Tensor, groups: ProcessGroups, device: torch.device) -> Tensor:
    """All context-parallel ranks' positions, which only the last stage has, on every rank."""
    nll = nll.to(device)
    dist.all_reduce(nll, group=groups.cp)
    dist.all_reduce(nll, group=groups.pp)
    return nll.cpu()
