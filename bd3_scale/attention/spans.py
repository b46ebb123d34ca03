"""The block diffusion mask as three integers a position.

B batch, L data tokens a sequence. Position i of a sequence holds `doc_start` (where its document starts), `block_start`
and `block_end` (its block, end exclusive). A clean query sees the clean keys [doc_start, block_end); a noisy query sees
the clean keys [doc_start, block_start) and the noisy keys [block_start, block_end): the block-causal mask of BD3-LM
(Arriola et al., ICLR 2025, section 3) with documents kept apart.
"""

from __future__ import annotations

import torch
from torch import Tensor


def make_spans(document_start: Tensor, block_size: int) -> Tensor:
    """Spans of packed sequences; blocks count from their document's own start and its end cuts the last one short.

    document_start: integers [B, L], for each position the position at which its document starts (zeros: one document).
    Returns int32 [3, B, L]: doc_start, block_start, block_end.
    ValueError: a `document_start` that does not describe documents side by side, or a block size below 1.
    """
    if document_start.ndim != 2 or document_start.is_floating_point() or document_start.dtype == torch.bool:
        raise ValueError(
            f"document_start has shape {tuple(document_start.shape)} and dtype {document_start.dtype}: "
            "give integers of shape [batch, seq_len]"
        )
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}: give at least 1")
    document_start = document_start.contiguous()
    document_end = torch.searchsorted(document_start, document_start, right=True)
    position = torch.arange(document_start.shape[1], device=document_start.device)
    block_start = position - (position - document_start) % block_size
    block_end = torch.minimum(block_start + block_size, document_end)
    spans = torch.stack([document_start, block_start, block_end]).to(torch.int32)
    check_spans(spans)
    return spans


def check_spans(spans: Tensor) -> None:
    """ValueError unless `spans` is int32 [3, B, L] of non-empty documents side by side, each cut into blocks.

    Waits for the device that holds `spans`: meant for the host, where batches are made.
    """
    if spans.ndim != 3 or spans.shape[0] != 3 or spans.dtype != torch.int32:
        raise ValueError(f"spans has shape {tuple(spans.shape)} and dtype {spans.dtype}: make it with make_spans")
    doc_start, block_start, block_end = spans
    position = torch.arange(spans.shape[2], device=spans.device)
    opens_document = doc_start == position
    opens_block = block_start == position
    closes_block = block_end == position + 1
    follows = torch.zeros_like(opens_block)
    follows[:, 1:] = closes_block[:, :-1]
    follows[:, :1] = True
    rules = {
        "doc_start <= block_start <= position < block_end <= seq_len": (doc_start >= 0)
        & (doc_start <= block_start)
        & (block_start <= position)
        & (position < block_end)
        & (block_end <= spans.shape[2]),
        "doc_start changes only where a document starts": opens_document | _same_as_before(doc_start),
        "a document starts with a block": opens_block | ~opens_document,
        "block_start changes only where a block starts": opens_block | _same_as_before(block_start),
        "a block starts exactly where the one before ends": opens_block == follows,
        "block_end changes only where a block starts": opens_block | _same_as_before(block_end),
    }
    for rule, holds in rules.items():
        if not bool(holds.all()):
            sequence, place = (~holds).nonzero()[0].tolist()
            raise ValueError(
                f"spans of sequence {sequence} at position {place} are {spans[:, sequence, place].tolist()} "
                f"(doc_start, block_start, block_end): {rule}; make them with make_spans"
            )


def _same_as_before(values: Tensor) -> Tensor:
    same = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
    same[:, 1:] = values[:, 1:] == values[:, :-1]
    return same
