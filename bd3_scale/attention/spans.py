"""Describe the block diffusion mask by three integers a position.

Legend: B batch, L data tokens a sequence, R positions of a context-parallel rank.

Position i of a sequence has `doc_start` (the start of its document), `block_start` and `block_end` (its block, end
exclusive). A clean query sees the clean keys [doc_start, block_end). A noisy query sees the clean keys
[doc_start, block_start) and the noisy keys [block_start, block_end). This is the block-causal mask of BD3-LM (Arriola
et al., ICLR 2025, section 3), with documents kept apart.

Why integers: a boolean mask of both streams has 4·L² numbers, 67 million at L = 4096, and a new one would be needed for
every batch, since documents and block sizes differ. Spans have 3·L integers, and the kernels compare positions with
them, so that a change of documents or block size compiles nothing anew.

A context-parallel rank has R of the positions, and its spans are int32 [5, B, R]. The first three integers count in the
clean keys of the whole sequence, which are gathered from all ranks. Noisy keys stay on their rank, so two more
integers, `own_start` and `own_end`, give the row's block as a range of the rank's own rows (see `take_ranges`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def make_spans(document_start: Tensor, block_size: int | Tensor) -> Tensor:
    """Return the spans of packed sequences, int32 [3, B, L]: doc_start, block_start, block_end.

    Blocks count from the start of their document, because a model that generates starts its blocks at the beginning of
    its text, too. The end of a document cuts its last block short.

    document_start: integers [B, L], for each position the position at which its document starts (zeros: one document);
    block_size: of all sequences, or integers [B] of each.
    ValueError: a `document_start` that does not describe documents one after the other, or a block size below 1.
    """
    if document_start.ndim != 2 or document_start.is_floating_point() or document_start.dtype == torch.bool:
        raise ValueError(
            f"document_start has shape {tuple(document_start.shape)} and dtype {document_start.dtype}: "
            "give integers of shape [batch, seq_len]"
        )
    sizes = torch.as_tensor(block_size, device=document_start.device).reshape(-1, 1)
    if bool((sizes < 1).any()):
        raise ValueError(f"block_size is {block_size}: give at least 1")
    document_start = document_start.contiguous()
    document_end = torch.searchsorted(document_start, document_start, right=True)
    position = torch.arange(document_start.shape[1], device=document_start.device)
    block_start = position - (position - document_start) % sizes
    block_end = torch.minimum(block_start + sizes, document_end)
    spans = torch.stack([document_start, block_start, block_end]).to(torch.int32)
    check_spans(spans)
    return spans


def check_spans(spans: Tensor, *, num_keys: int | None = None) -> None:
    """Raise ValueError unless `spans` is int32 [3, B, L] of non-empty documents one after the other, cut into blocks.

    With `num_keys`, the number of clean keys of the sequence, also accepts [5, B, R] of `take_ranges`, where a row may
    see no key at all. The check reads values: on a GPU it would wait for the device, so call it on the host.
    """
    if spans.ndim != 3 or spans.shape[0] not in (3, 5) or spans.dtype != torch.int32:
        raise ValueError(f"spans has shape {tuple(spans.shape)} and dtype {spans.dtype}: make it with make_spans")
    rules = _sequence_rules(spans) if spans.shape[0] == 3 else _row_rules(spans, num_keys or 0)
    if all(bool(holds.all()) for holds in rules.values()):
        return
    rule, holds = next((rule, holds) for rule, holds in rules.items() if not bool(holds.all()))
    sequence, position = (~holds).nonzero()[0].tolist()
    names = "doc_start, block_start, block_end" + ", own_start, own_end" * (spans.shape[0] == 5)
    made_by = "make_spans" if spans.shape[0] == 3 else "take_ranges"
    raise ValueError(
        f"spans of sequence {sequence} at position {position} are {spans[:, sequence, position].tolist()} "
        f"({names}): {rule}; make them with {made_by}"
    )


def _sequence_rules(spans: Tensor) -> dict[str, Tensor]:
    doc_start, block_start, block_end = spans
    position = torch.arange(spans.shape[2], device=spans.device)
    opens_document = doc_start == position
    opens_block = block_start == position
    closes_block = block_end == position + 1
    follows = torch.zeros_like(opens_block)
    follows[:, 1:] = closes_block[:, :-1]
    follows[:, :1] = True
    return {
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


def _row_rules(spans: Tensor, num_keys: int) -> dict[str, Tensor]:
    doc_start, block_start, block_end, own_start, own_end = spans
    row = torch.arange(spans.shape[2], device=spans.device)
    sees_own = own_start < own_end
    rises = torch.ones_like(sees_own)
    rises[:, 1:] = (spans[:, :, 1:] >= spans[:, :, :-1]).all(0)
    same_block = _same_as_before(own_start) & _same_as_before(own_end)
    return {
        f"0 <= doc_start <= block_start <= block_end <= {num_keys}, the number of clean keys": (doc_start >= 0)
        & (doc_start <= block_start)
        & (block_start <= block_end)
        & (block_end <= num_keys),
        "none of them decreases from one row to the next": rises,
        "own_start <= row < own_end, or own_start = own_end = row where no noisy key is seen": (own_start >= 0)
        & (own_start <= row)
        & torch.where(sees_own, row < own_end, own_end == row)
        & (own_end <= spans.shape[2]),
        "own_start and own_end change only where a block starts": ~sees_own | (own_start == row) | same_block,
    }


def zigzag_ranges(seq_len: int, rank: int, size: int) -> list[tuple[int, int]]:
    """Return the positions of context-parallel rank `rank` of `size`: two of 2·size equal ranges of the sequence.

    They are the `rank`-th range from the start and the `rank`-th from the end. Early rows see few clean keys and late
    rows many; one range of each gives all ranks equally many query-key pairs (as in Megatron's context parallelism).
    ValueError: `seq_len` is not divisible by 2·size.
    """
    if size == 1:
        return [(0, seq_len)]
    if seq_len % (2 * size):
        raise ValueError(f"seq_len {seq_len} does not divide into 2 ranges for each of {size} ranks")
    length = seq_len // (2 * size)
    return [(part * length, (part + 1) * length) for part in (rank, 2 * size - 1 - rank)]


def take_ranges(spans: Tensor, ranges: Sequence[tuple[int, int]], *, own_keys: bool = True) -> Tensor:
    """Return the spans int32 [5, B, R] of the positions in `ranges`, those of one context-parallel rank.

    spans: int32 [3, B, L] of the whole sequences, on the host.
    ranges: [start, end) pairs in ascending order, each of whole blocks of every sequence. Rows are numbered through all
    ranges; their number is R.
    own_keys: whether rows see the noisy keys of their rank. False for MDLM, where the noisy keys of all ranks are
    gathered and take the role of clean keys; ranges may then cut blocks.
    ValueError: ranges that overlap, leave the sequence or cut a block.
    """
    check_spans(spans)
    previous_end = 0
    for start, end in ranges:
        if not previous_end <= start < end <= spans.shape[2]:
            raise ValueError(
                f"ranges are {list(ranges)}: give non-empty [start, end) pairs in ascending order within seq_len "
                f"{spans.shape[2]}"
            )
        cut = (spans[1, :, start] != start) | (spans[2, :, end - 1] != end)
        if own_keys and bool(cut.any()):
            raise ValueError(
                f"ranges: [{start}, {end}) cuts a block of sequence {int(cut.nonzero()[0])}: noisy keys stay with "
                "their rank, so give every rank whole blocks"
            )
        previous_end = end
    positions = torch.cat([torch.arange(start, end, device=spans.device) for start, end in ranges])
    row = torch.arange(len(positions), device=spans.device, dtype=torch.int32)
    taken = spans[:, :, positions]
    # A range has whole blocks, so the shift from position to row number is the same for a row and its block's ends.
    own = taken[1:] + (row - positions).to(torch.int32) if own_keys else row.expand(2, spans.shape[1], -1)
    return torch.cat([taken, own])


def own_block(spans: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and the end row [B, R] of every row's block, counted in the rows themselves."""
    # The last two of three or of five: without context parallelism rows are positions.
    return spans[-2], spans[-1]


def count_pairs(spans: Tensor, *, num_noisy: int, clean_queries: bool) -> int:
    """Count the query-key pairs that the mask allows, summed over the batch, for one head; waits for the device."""
    doc_start, block_start, block_end = spans[:3].long()
    own_start, own_end = own_block(spans.long())
    pairs = num_noisy * (block_start - doc_start + own_end - own_start)
    return int((pairs + (block_end - doc_start) if clean_queries else pairs).sum())


def _same_as_before(values: Tensor) -> Tensor:
    same = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
    same[:, 1:] = values[:, 1:] == values[:, :-1]
    return same
