"""Make a rank's model inputs from a batch of clean sequences.

Everything is computed on the host, beside the data. The number of masked rows differs from batch to batch; computed on
a GPU it would have to be copied back, and the host would wait for the GPU at every micro-batch.

Legend: B sequences, L data tokens a sequence, M rows of the head, C context-parallel ranks.
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

# Rank and number of the context-parallel ranks, which split the positions of a sequence.
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
    """Return the inputs of the two-stream forward: the noisy copies of this rank's positions, then the clean tokens.

    This is the vectorised training of BD3-LM (Arriola et al., ICLR 2025, section 3.2): one forward gives the loss of
    every block, each conditioned on the clean blocks before it. The loss is the mean over the noisy copies.

    block_size: of all sequences, or int64 [B] of each. Where one block is the whole sequence (MDLM), no noisy row
    sees a clean one, and the clean rows are left out. With several block sizes they are always there, since
    the sequences with smaller blocks see them.
    spans: of these blocks, if they are made already.
    ValueError: a context-parallel rank's range of positions would cut a block.
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
    """Return the inputs of next-token prediction: clean rows with causal attention, and no noisy rows.

    Each row predicts the next token of its document, unless that token is shown.
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


def next_token_positions(batch: Batch, context: Context = (0, 1)) -> tuple[Tensor, Tensor]:
    """Return sequence and position [M] of the token that each row of the head predicts, for inputs of `next_tokens`."""
    positions = rank_positions(batch.tokens.shape[1], context)
    sequence, row = _has_next(batch)[:, positions].nonzero().T
    return sequence, positions[row] + 1


def _has_next(batch: Batch) -> Tensor:
    """Return bool [B, L]: whether the next token belongs to the same document and is not shown."""
    within = (batch.document_start.roll(-1, 1) == batch.document_start) & ~batch.shown.roll(-1, 1)
    within[:, -1] = False
    return within


def mask_noise(
    batch: Batch, std: float, *, copies: int, seed: int, device: torch.device, context: Context = (0, 1)
) -> MaskNoise:
    """Return the noise to add to the mask embeddings of this rank's positions, in each of `copies` noisy copies."""
    seq_len = batch.tokens.shape[1]
    rows = draw_embedding_noise(seq_len=seq_len, seed=seed, copies=copies, rows=NOISE_ROWS, **batch.noise_keys)
    rows = torch.cat(list(rows[:, :, rank_positions(seq_len, context)]), 1)
    return MaskNoise(rows, std).to(device)


def masked_positions(noise: Noise, context: Context) -> tuple[Tensor, Tensor]:
    """Return sequence and position [M] of each row of the head, for inputs that `corrupt` makes of one noise."""
    positions = rank_positions(noise.masked.shape[1], context)
    sequence, row = noise.masked[:, positions].nonzero().T
    return sequence, positions[row]


def rank_positions(seq_len: int, context: Context) -> Tensor:
    """Return the positions of a context-parallel rank in a sequence, int64 [L/C], in the order of its rows."""
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
    rank_rows = rank_positions(spans.shape[2], context)
    has_clean = tokens.shape[1] // len(rank_rows) > num_noisy
    noisy_pairs = count_pairs(spans[:, :, rank_rows], num_noisy=num_noisy, clean_queries=False)
    clean_pairs = count_pairs(spans[:, :, rank_rows], num_noisy=0, clean_queries=True) if has_clean else 0
    if context[1] > 1:
        # With a clean stream only clean keys are gathered from other ranks: a noisy key is seen by its own block alone,
        # and a block lies inside one rank's range. Without it (MDLM) the noisy keys of all ranks are gathered.
        spans = take_ranges(spans, zigzag_ranges(spans.shape[2], *context), own_keys=has_clean)
    inputs = ModelInputs(
        tokens=tokens,
        positions=batch.positions[:, rank_rows],
        spans=spans,
        num_noisy=num_noisy,
        head_rows=head_rows,
        targets=targets,
        weights=weights,
        row_loss=row_loss,
        noisy_pairs=noisy_pairs,
        clean_pairs=clean_pairs,
        trained_tokens=tuple((~batch.shown[:, rank_rows]).sum(1).tolist()),
    )
    return inputs.to(device)
