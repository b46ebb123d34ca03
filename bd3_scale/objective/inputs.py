"""From a batch of clean sequences to what a rank's model takes.

Everything is computed on the host, with the data: the device never waits to learn how many rows are masked.

Legend: B sequences, L data tokens a sequence, C noisy copies, R positions of this context-parallel rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bd3_scale.attention.spans import count_pairs, make_spans, take_ranges, zigzag_ranges
from bd3_scale.data.batch import Batch
from bd3_scale.diffusion.nelbo import loss_weight
from bd3_scale.diffusion.noise import Noise, draw_embedding_noise
from bd3_scale.model.rows import NOISE_ROWS, MaskNoise, ModelInputs, RowLoss

# Rank and number of the ranks that split the positions of a sequence.
Context = tuple[int, int]


def corrupt(
    batch: Batch,
    noises: Sequence[Noise],
    block_size: int | Tensor,
    *,
    mask_id: int,
    device: torch.device,
    context: Context = (0, 1),
    row_loss: RowLoss | None = None,
    spans: Tensor | None = None,
) -> ModelInputs:
    """Return noisy copies of this rank's positions beside the clean tokens; the loss is the mean over the copies.

    block_size: of all sequences, or int64 [B] of each. Where one block is the whole sequence no row would see a clean
    one, and there are none; sequences of several block sizes always have them. spans: of these blocks, where they are
    made already.
    ValueError: documents whose blocks the ranks' ranges would cut.
    """
    seq_len = batch.tokens.shape[1]
    clean_stream = isinstance(block_size, Tensor) or block_size < seq_len
    positions = rank_positions(seq_len, context)
    clean = batch.tokens[:, positions]
    masked = torch.stack([noise.masked[:, positions] for noise in noises])
    weights = torch.stack([loss_weight(noise)[:, positions] for noise in noises]) / len(noises)
    copies = [clean.masked_fill(mask, mask_id) for mask in masked]
    copy, sequence, row = masked.nonzero().T
    return _inputs(
        batch,
        torch.cat([*copies, clean], 1) if clean_stream else torch.cat(copies, 1),
        make_spans(batch.document_start, block_size) if spans is None else spans,
        num_noisy=len(noises),
        head_rows=(copy * len(positions) + row) * len(clean) + sequence,
        targets=clean[sequence, row],
        weights=weights[masked],
        row_loss=row_loss,
        context=context,
        device=device,
    )


def next_tokens(
    batch: Batch, *, device: torch.device, context: Context = (0, 1), row_loss: RowLoss | None = None
) -> ModelInputs:
    """Return clean rows alone, each of which sees those before it and predicts the next token of its document, unless
    that is shown: AR.
    """
    seq_len = batch.tokens.shape[1]
    positions = rank_positions(seq_len, context)
    clean = batch.tokens[:, positions]
    following = batch.tokens.roll(-1, 1)[:, positions]
    sequence, row = _has_next(batch)[:, positions].nonzero().T
    return _inputs(
        batch,
        clean,
        make_spans(batch.document_start, 1),
        num_noisy=0,
        head_rows=row * len(clean) + sequence,
        targets=following[sequence, row],
        weights=torch.ones(len(row)),
        row_loss=row_loss,
        context=context,
        device=device,
    )


def next_token_places(batch: Batch, context: Context = (0, 1)) -> tuple[Tensor, Tensor]:
    """Return sequence and position [M] of the token that each row of the head predicts in what `next_tokens` makes."""
    positions = rank_positions(batch.tokens.shape[1], context)
    sequence, row = _has_next(batch)[:, positions].nonzero().T
    return sequence, positions[row] + 1


def _has_next(batch: Batch) -> Tensor:
    """Return bool [B, L]: the next token belongs to the same document, and is not shown."""
    within = (batch.document_start.roll(-1, 1) == batch.document_start) & ~batch.shown.roll(-1, 1)
    within[:, -1] = False
    return within


def mask_noise(
    batch: Batch, std: float, *, copies: int, seed: int, device: torch.device, context: Context = (0, 1)
) -> MaskNoise:
    """Return noise on the mask embeddings of `copies` noisy copies of this rank's positions."""
    seq_len = batch.tokens.shape[1]
    rows = draw_embedding_noise(seq_len=seq_len, seed=seed, copies=copies, rows=NOISE_ROWS, **batch.noise_keys)
    rows = torch.cat(list(rows[:, :, rank_positions(seq_len, context)]), 1)
    return MaskNoise(rows, std).to(device)


def masked_places(noise: Noise, context: Context) -> tuple[Tensor, Tensor]:
    """Return sequence and position [M] of each row of the head in what `corrupt` makes of one noise."""
    positions = rank_positions(noise.masked.shape[1], context)
    sequence, row = noise.masked[:, positions].nonzero().T
    return sequence, positions[row]


def rank_positions(seq_len: int, context: Context) -> Tensor:
    """Return the places in a sequence, int64 [L/C], that a context-parallel rank has; in the order of its rows."""
    return torch.cat([torch.arange(start, end) for start, end in zigzag_ranges(seq_len, *context)])


def _inputs(
    batch: Batch,
    tokens: Tensor,
    spans: Tensor,
    *,
    num_noisy: int,
    head_rows: Tensor,
    targets: Tensor,
    weights: Tensor,
    row_loss: RowLoss | None,
    context: Context,
    device: torch.device,
) -> ModelInputs:
    places = rank_positions(spans.shape[2], context)
    has_clean = tokens.shape[1] // len(places) > num_noisy
    noisy_pairs = count_pairs(spans[:, :, places], num_noisy=num_noisy, clean_queries=False)
    clean_pairs = count_pairs(spans[:, :, places], num_noisy=0, clean_queries=True) if has_clean else 0
    if context[1] > 1:
        # Without a clean stream the noisy keys of all ranks are gathered.
        spans = take_ranges(spans, zigzag_ranges(spans.shape[2], *context), own_keys=has_clean)
    made = ModelInputs(
        tokens=tokens,
        positions=batch.positions[:, places],
        spans=spans,
        num_noisy=num_noisy,
        head_rows=head_rows,
        targets=targets,
        weights=weights,
        row_loss=row_loss,
        noisy_pairs=noisy_pairs,
        clean_pairs=clean_pairs,
        trained_tokens=tuple((~batch.shown[:, places]).sum(1).tolist()),
    )
    return made.to(device)
