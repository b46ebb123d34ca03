"""Measure the NELBO perplexity of held-out sequences: the bound over mask rates U[0, 1], exact at block size 1."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bd3_scale.attention.spans import make_spans
from bd3_scale.data.batch import Batch
from bd3_scale.diffusion.interval import IntervalSearch, block_moments, search_intervals
from bd3_scale.diffusion.nelbo import NelboEstimate, estimate_nelbo
from bd3_scale.model.build import Chunks
from bd3_scale.objective import Draw, Objective
from bd3_scale.parallel.collective import gather_tensors
from bd3_scale.parallel.groups import ProcessGroups, placement
from bd3_scale.parallel.schedule import token_losses


@dataclass(frozen=True)
class HeldOut:
    """The NELBO of held-out text, and the statistics that the search of the clipped interval needs.

    nelbo: of the counted tokens. Padding behind the end of a document is always masked and does not count: where a
    block is partly padding, this bounds the likelihood of its text when nothing behind the end is ever filled in, which
    is not what `generate` does there.
    padded: the same with the padding of a document's last block counted, too, and masked as in training, in nats per
    token of the text. The text is then what `generate` writes up to that block's end, and this an upper bound of its
    negative log-likelihood. None if not requested; equal to `nelbo` where no block is partly padding.
    moments: those of `block_moments`, for all ranks' sequences in the order of their ids; None for an objective without
        masks.
    sums, tokens: float64 [draws, sequences] and int64 [sequences], from which `nelbo` was estimated.
    """

    nelbo: NelboEstimate
    block_size: int
    moments: Tensor | None
    padded: NelboEstimate | None = None
    sums: Tensor | None = None
    tokens: Tensor | None = None

    @classmethod
    def merged(cls, parts: Sequence[HeldOut]) -> HeldOut:
        """Return the result of several held-out texts taken as one text."""
        if len(parts) == 1:
            return parts[0]
        sums = torch.cat([part.sums for part in parts if part.sums is not None], 1)
        tokens = torch.cat([part.tokens for part in parts if part.tokens is not None])
        moments = [part.moments for part in parts if part.moments is not None]
        merged = torch.cat(moments, 1) if moments else None
        return cls(estimate_nelbo(sums, tokens), parts[0].block_size, merged, None, sums, tokens)

    def intervals(self) -> IntervalSearch:
        """Return the loss's variance under every clipped interval. ValueError: too little text, or no masks."""
        if self.moments is None:
            raise ValueError("this objective masks nothing: it has no interval of mask rates to search")
        return search_intervals(self.moments, self.block_size)


@torch.no_grad()
def evaluate_nelbo(
    chunks: Chunks,
    batches: Iterable[Batch],
    groups: ProcessGroups,
    *,
    objective: Objective,
    draws: int,
    padded: bool = False,
    progress: Callable[[int], object] = lambda sequences: None,
) -> HeldOut:
    """Return the NELBO in nats per counted token over all data-parallel ranks' `batches` (collective).

    If `objective.is_exact` it is the negative log-likelihood, left to right. All data-parallel ranks have the same
    number of batches, of one shape; sequences of id −1 are only there to complete a batch.

    Args:
        padded: also compute `HeldOut.padded`, with another pass over sequences in which a block is partly padding.
        progress: called after each batch with the number of sequences that it finished.
    """
    draws = objective.num_draws(draws)
    for chunk in chunks:
        chunk.eval()
    sums, counted, moments = [torch.empty(2, draws, 0).double()], [torch.empty(2, 0).long()], []
    for batch in batches:
        real = batch.ids >= 0
        batch = objective.counting(batch)
        # A clean padding token would tell the model where the document ends, so padding stays masked in every draw.
        drawn = objective.evaluation_draws(batch, draws, always=batch.padding, place=placement(groups, chunks))
        nll = token_nll(chunks, drawn, groups)
        batch_sums = weighted_sums(drawn, nll, batch.counted)
        with_padding = _with_padding(chunks, batch, batch_sums, groups, objective) if padded else batch_sums
        sums.append(torch.stack([batch_sums, with_padding])[:, :, real])
        if objective.fills_masks:
            moments.append(_moments(nll, drawn, batch.counted, objective.block_size)[:, real])
        counted.append(torch.stack([batch.ids, batch.counted.sum(1)])[:, real])
        progress(int(real.sum()))
    ids, tokens = torch.cat(gather_tensors(torch.cat(counted, 1), groups.dp), 1)
    order = ids.argsort()  # the result must not depend on which rank had which sequence
    all_sums = torch.cat(gather_tensors(torch.cat(sums, 2), groups.dp), 2)[:, :, order]
    estimate, with_padding_counted = (estimate_nelbo(each, tokens[order]) for each in all_sums)
    all_moments = gather_tensors(torch.cat(moments, 1), groups.dp) if moments else []
    return HeldOut(
        estimate,
        objective.block_size,
        torch.cat(all_moments, 1)[:, order] if all_moments else None,
        with_padding_counted if padded else None,
        all_sums[0],
        tokens[order],
    )


def _with_padding(chunks: Chunks, batch: Batch, sums: Tensor, groups: ProcessGroups, objective: Objective) -> Tensor:
    """Return `sums` [draws, B] in which sequences with partly padded blocks are computed anew, that padding counted."""
    start, end = make_spans(batch.document_start, objective.block_size)[1:]
    text = torch.nn.functional.pad(batch.counted.cumsum(1), (1, 0))
    # Whether any token of each position's block counts, by the cumulative sum at the block's ends.
    in_text = (text.gather(1, end.long()) - text.gather(1, start.long())) > 0
    counts = batch.counted | (batch.padding & in_text)
    rows = (counts != batch.counted).any(1).nonzero()[:, 0]
    if not len(rows):
        return sums
    part, counts = batch.take(rows), counts[rows]
    drawn = objective.evaluation_draws(part, len(sums), always=part.padding & ~counts, place=placement(groups, chunks))
    sums = sums.clone()
    sums[:, rows] = weighted_sums(drawn, token_nll(chunks, drawn, groups), counts)
    return sums


def _moments(nll: Tensor, drawn: Sequence[Draw], counted: Tensor, block_size: int) -> Tensor:
    """Return `block_moments` of the blocks that hold text; blocks of padding do not take part in the search."""
    rates = torch.stack([draw.mask_rate for draw in drawn if draw.mask_rate is not None])[:, :, ::block_size]
    blocks = (nll * counted).unflatten(2, (-1, block_size)).sum(3)
    return block_moments(blocks, rates, block_size, counted.unflatten(1, (-1, block_size)).any(2))


def weighted_sums(drawn: Sequence[Draw], nll: Tensor, counted: Tensor) -> Tensor:
    """Return each draw's estimate of the NELBO of each sequence in nats, float64 [draws, B]; see `token_nll`."""
    return torch.stack([(loss * draw.weight * counted).sum(1) for loss, draw in zip(nll, drawn, strict=True)])


def token_nll(chunks: Chunks, drawn: Sequence[Draw], groups: ProcessGroups) -> Tensor:
    """Return each draw's loss of every predicted token, float64 [draws, B, L] in nats, 0 elsewhere; on every rank."""
    inputs = [draw.inputs for draw in drawn]
    # The interleaved schedule needs a number of micro-batches that the number of stages divides; the last is repeated.
    filled = inputs + inputs[-1:] * (-len(inputs) % groups.pp.size() if len(chunks) > 1 else 0)
    losses = token_losses(chunks, filled, groups)[: len(inputs)]
    nll = torch.zeros(len(drawn), *drawn[0].weight.shape, dtype=torch.float64)
    for index, (loss, draw) in enumerate(zip(losses, drawn, strict=False)):
        nll[index][draw.sequence, draw.position] = loss.double().cpu()
    # Each context-parallel rank has the losses of its positions, on the last pipeline stage alone; the others hold
    # zeros.
    nll = nll.to(placement(groups, chunks).device)
    for group in (groups.cp, groups.pp):
        if group.size() > 1:
            dist.all_reduce(nll, group=group)
    return nll.cpu()
